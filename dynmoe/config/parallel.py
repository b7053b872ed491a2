"""Configuration of parallelism, and the limits of each engine."""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm, prod
from typing import ClassVar

from dynmoe.config.model import ModelConfig
from dynmoe.errors import ConfigError
from dynmoe.fields import Section, option

_MEGATRON_ONLY = ("tensor", "pipeline", "virtual_pipeline", "context")


@dataclass
class DeepSpeedConfig(Section):
    _section: ClassVar[str] = "deepspeed"

    zero_stage: int = option(
        1, "ZeRO stage: shard nothing (0), optimizer state (1), also gradients (2), or also weights (3); Megatron-Core "
        "always shards the optimizer state",
        at_least=0, at_most=3,
    )  # fmt: skip

    def check_optimizer(self, kind: str) -> None:
        """Raises a ConfigError for an optimizer that does not work with the stage."""
        if self.zero_stage == 3 and kind == "muon":
            problem = "DeepSpeed updates a few of the matrices at a time, on each rank others, so none would be whole"
            raise ConfigError("deepspeed.zero_stage", 3, problem, "use 0, 1 or 2, or optimizer.kind=adamw")


@dataclass
class ParallelConfig(Section):
    _section: ClassVar[str] = "parallel"

    expert: int = option(1, "expert-parallel size: ranks over which the experts of a layer are spread", at_least=1)
    tensor: int = option(1, "tensor-parallel size, with sequence parallelism (engine=megatron)", at_least=1)
    pipeline: int = option(1, "pipeline-parallel size (engine=megatron)", at_least=1)
    virtual_pipeline: int = option(1, "model chunks of a pipeline stage (above 1: interleaved schedule)", at_least=1)
    context: int = option(
        1, "context-parallel size: ranks over which each sequence is spread; each computes the attention of some heads "
        "(engine=megatron)", at_least=1,
    )  # fmt: skip
    elastic: str = option(
        "resume", "which starts may use a smaller train.micro_batch, or fewer ranks than there are, if the "
        "configuration does not fit: none (never), those that continue a run (resume), or all (always)",
        choices=("never", "resume", "always"),
    )  # fmt: skip

    @property
    def model_parallel(self) -> int:
        """Number of ranks that process the same sequences."""
        return self.tensor * self.pipeline * self.context

    @property
    def fewest_ranks(self) -> int:
        """The smallest world size that fits."""
        return self.pipeline * lcm(self.tensor * self.context, self.expert)

    @property
    def sequence_parts(self) -> int:
        """Number of equal parts into which sequences are split; it divides their length."""
        return self.tensor * self.context

    def check_deepspeed(self) -> None:
        """Raises a ConfigError for sizes that DeepSpeed does not support."""
        for name in _MEGATRON_ONLY:
            size = getattr(self, name)
            if size > 1:
                problem = "DeepSpeed supports only expert and data parallelism"
                raise ConfigError(f"parallel.{name}", size, problem, f"set {name} to 1 or engine=megatron")

    def check_megatron(self, model: ModelConfig, sequence_length: int) -> None:
        """Raises a ConfigError for sizes over which the model and its sequences cannot be split evenly."""
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            problem = "needs pipeline parallelism"
            raise ConfigError("parallel.virtual_pipeline", self.virtual_pipeline, problem, "set parallel.pipeline")
        stages = self.pipeline * self.virtual_pipeline
        self._check_splits("model.layers", model.layers, "pipeline", "virtual_pipeline")
        last = [layer for layer in model.moe_layers if (layer + 1) % (model.layers // stages) == 0]
        if model.moe.shortcut and last:
            problem = f"splits layers {last[0]} and {last[0] + 1}, which model.moe.shortcut connects, into two stages"
            cure = "use fewer stages, or more model.layers"
            raise ConfigError(*self._last_split("pipeline", "virtual_pipeline"), problem, cure)
        split = {"model.kv_heads": model.kv_heads, "model.ffn_hidden": model.ffn_hidden}
        if (rank := model.latent.kv_lora_rank) is not None:  # Megatron-Core refuses to build others
            split["model.latent.q_lora_rank"] = model.latent.q_lora_rank or 0
            split["model.latent.kv_lora_rank + qk_rope_head_dim"] = rank + model.latent.qk_rope_head_dim
        for field, value in split.items():
            self._check_splits(field, value, "tensor")
        self._check_splits("model.heads", model.heads, "tensor", "context")
        self._check_splits("data.sequence_length", sequence_length, "tensor", "context")

    def _check_splits(self, field: str, value: int, *names: str) -> None:
        """Raises a ConfigError unless the product of the sizes ``names`` divides the value of ``field``."""
        parts = prod(getattr(self, name) for name in names)
        if value % parts:
            field_of_size, size = self._last_split(*names)
            into = f"{parts}" if parts == size else f"{' x '.join(names)} ({parts})"
            problem = f"cannot split {field} ({value}) evenly into {into}"
            raise ConfigError(field_of_size, size, problem, "change one of them")

    def _last_split(self, *names: str) -> tuple[str, int]:
        """The last of the sizes ``names`` that splits anything, with its field: the one to name in an error."""
        return next((f"parallel.{name}", getattr(self, name)) for name in reversed(names) if getattr(self, name) > 1)

    def check_experts(self, model: ModelConfig) -> None:
        """Raises a ConfigError unless the expert-parallel size divides the number of experts of every layer."""
        counts = [model.experts_of(layer) for layer in model.moe_layers]
        if self.expert > 1 and (not counts or any(count % self.expert for count in counts)):
            shown = ", ".join(str(count) for count in sorted(set(counts)))
            cure = f"use a divisor of model.moe.experts ({shown})" if counts else "use 1, as the model is dense"
            raise ConfigError("parallel.expert", self.expert, "cannot spread the experts evenly", cure)

    def check_world(self, world_size: int) -> None:
        """Raises a ConfigError if the sizes do not fit ``world_size`` ranks."""
        if world_size % self.model_parallel:
            name = max(("tensor", "pipeline", "context"), key=lambda name: getattr(self, name))
            problem = f"tensor x pipeline x context ({self.model_parallel}) must divide the world size ({world_size})"
            cure = "start a multiple of it, or reduce one of them"
            raise ConfigError(f"parallel.{name}", getattr(self, name), problem, cure)
        if world_size // self.pipeline % self.expert:
            ranks = "ranks of a pipeline stage" if self.pipeline > 1 else "world size"
            problem = f"must divide the {ranks} ({world_size // self.pipeline})"
            cure = f"start a multiple of {self.fewest_ranks} ranks, or use a divisor"
            raise ConfigError("parallel.expert", self.expert, problem, cure)
