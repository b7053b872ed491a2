"""How a run is spread over ranks, and what each engine can do of it."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import ClassVar

from dynmoe.config.model import ModelConfig
from dynmoe.errors import ConfigError
from dynmoe.fields import Section, option

# What only Megatron-Core has.
_MEGATRON_ONLY = ("tensor", "pipeline", "virtual_pipeline", "context")


@dataclass
class DeepSpeedConfig(Section):
    _section: ClassVar[str] = "deepspeed"

    zero_stage: int = option(1, "ZeRO stage: 0, 1 (optimizer state) or 2 (and gradients) spread over ranks", at_least=0)

    def check(self, model: ModelConfig) -> None:
        """Refuses stages that are not offered."""
        stage = self.zero_stage
        if stage == 3 and model.moe.experts:
            problem = "ZeRO 3 shards parameters, which expert parallelism already does, and DeepSpeed cannot do both"
            raise ConfigError("deepspeed.zero_stage", stage, problem, "use 0, 1 or 2, and a larger parallel.expert")
        if stage > 2:
            raise ConfigError("deepspeed.zero_stage", stage, "is not offered", "use 0, 1 or 2")


@dataclass
class ParallelConfig(Section):
    _section: ClassVar[str] = "parallel"

    expert: int = option(1, "expert-parallel size: ranks over which the experts of a layer are spread", at_least=1)
    tensor: int = option(1, "tensor-parallel size, with sequence parallelism (engine=megatron)", at_least=1)
    pipeline: int = option(1, "pipeline-parallel size (engine=megatron)", at_least=1)
    virtual_pipeline: int = option(
        1, "parts of the model on each pipeline stage; with several the schedule is interleaved", at_least=1
    )
    context: int = option(1, "context-parallel size (engine=megatron, needs Transformer Engine)", at_least=1)

    @property
    def model_parallel(self) -> int:
        """Ranks that work on the same sequences."""
        return self.tensor * self.pipeline * self.context

    @property
    def sequence_parts(self) -> int:
        """Equal parts that sequences are cut into: their length is a multiple of it."""
        return self.tensor * (2 * self.context if self.context > 1 else 1)

    def check_deepspeed(self) -> None:
        """Refuses what DeepSpeed cannot do."""
        for name in _MEGATRON_ONLY:
            size = getattr(self, name)
            if size > 1:
                problem, cure = "DeepSpeed runs expert and data parallelism only", f"set {name} to 1 or engine=megatron"
                raise ConfigError(f"parallel.{name}", size, problem, cure)

    def check_megatron(self, model: ModelConfig, sequence_length: int) -> None:
        """Refuses sizes over which this model and its sequences cannot be spread evenly."""
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            problem, cure = "interleaves the stages of a pipeline, and there is none", "set parallel.pipeline"
            raise ConfigError("parallel.virtual_pipeline", self.virtual_pipeline, problem, cure)
        stages = self.pipeline * self.virtual_pipeline
        name = "virtual_pipeline" if self.virtual_pipeline > 1 else "pipeline"
        _check_divides(f"parallel.{name}", getattr(self, name), stages, "model.layers", model.layers)
        spread = {"model.kv_heads": model.kv_heads, "model.ffn_hidden": model.ffn_hidden}
        for field, value in spread.items():
            _check_divides("parallel.tensor", self.tensor, self.tensor, field, value)
        name, parts = "context" if self.context > 1 else "tensor", self.sequence_parts
        _check_divides(f"parallel.{name}", getattr(self, name), parts, "data.sequence_length", sequence_length)

    def check_experts(self, model: ModelConfig) -> None:
        """Refuses an expert-parallel size that does not divide the experts of every layer."""
        counts = [model.experts_of(layer) for layer in model.moe_layers]
        if self.expert > 1 and (not counts or any(count % self.expert for count in counts)):
            shown = ", ".join(str(count) for count in sorted(set(counts)))
            cure = f"use a divisor of model.moe.experts ({shown})" if counts else "set it to 1: the model is dense"
            raise ConfigError("parallel.expert", self.expert, "cannot spread the experts evenly", cure)

    def check_world(self, world_size: int) -> None:
        """Refuses sizes that do not fit ``world_size`` ranks, or what is installed here."""
        if self.context > 1 and importlib.util.find_spec("transformer_engine") is None:
            cure = "install it, or use parallel.tensor"
            raise ConfigError("parallel.context", self.context, "needs Transformer Engine, which is not here", cure)
        if world_size % self.model_parallel:
            name = max(("tensor", "pipeline", "context"), key=lambda name: getattr(self, name))
            problem = f"tensor x pipeline x context ({self.model_parallel}) does not divide the ranks ({world_size})"
            cure = "start a multiple of it, or make one of them smaller"
            raise ConfigError(f"parallel.{name}", getattr(self, name), problem, cure)
        if world_size // self.pipeline % self.expert:
            ranks = f"of a pipeline stage ({world_size // self.pipeline})" if self.pipeline > 1 else f"({world_size})"
            cure = f"use a divisor of the number of ranks {ranks}"
            raise ConfigError("parallel.expert", self.expert, "does not divide the ranks", cure)


def _check_divides(name: str, value: int, divisor: int, dividend: str, size: int) -> None:
    if size % divisor:
        problem = f"cannot spread {dividend} ({size}) over {divisor} evenly"
        raise ConfigError(name, value, problem, "change one of them")
