"""The sections of the configuration, each a dataclass that checks itself."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Optional

from omegaconf import OmegaConf

from dynmoe.config.checkpoint import CheckpointConfig
from dynmoe.config.control import AdaptationConfig, BudgetConfig
from dynmoe.config.evaluation import EvalConfig
from dynmoe.config.fields import Section, check_multiple_of_8, option
from dynmoe.config.guard import GuardConfig
from dynmoe.config.logging import LoggingConfig
from dynmoe.config.parallel import DeepSpeedConfig, ParallelConfig
from dynmoe.config.routing import MoEConfig, RouterConfig
from dynmoe.errors import ConfigError

_LONGEST_NAME = 240  # a job's log is NAME-JOB.out, a directory under way NAME.tmp-12345678


@dataclass
class RunConfig(Section):
    _section: ClassVar[str] = "run"

    name: str = option("default", "name of the run; its directory is run.dir/run.name")
    dir: str = option("runs", "directory that holds the run directories")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            cure = "use letters, digits, '.', '_' and '-', starting with a letter or digit"
            raise ConfigError("run.name", self.name, "cannot name a directory", cure)
        if len(self.name) > _LONGEST_NAME:
            cure = f"use at most {_LONGEST_NAME} characters, as names of files may have 255 and some add to it"
            raise ConfigError("run.name", self.name, f"has {len(self.name)} characters", cure)

    @property
    def path(self) -> Path:
        return Path(self.dir) / self.name


@dataclass
class DataConfig(Section):
    _section: ClassVar[str] = "data"

    dirs: list[str] = option(["data/stdlib"], "prepared corpora (directories written by data_prep), one or several")
    weights: list[float] = option(
        [], "share of each corpus in the blend; empty: in proportion to their tokens", at_least=1e-9, at_most=1e9
    )
    sequence_length: int = option(512, "tokens of one training sequence", at_least=1)
    verify: str = option(
        "once", "check every hash and token id of the corpora before the first step: once, and again when a file has "
        "changed; always; or never", choices=("once", "always", "never"),
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.dirs:
            raise ConfigError("data.dirs", self.dirs, "names no corpus", "name a directory written by data_prep")
        if self.weights and len(self.weights) != len(self.dirs):
            cure = f"give {len(self.dirs)} weights (one for each of data.dirs) or none"
            raise ConfigError("data.weights", self.weights, "does not match data.dirs", cure)


@dataclass
class ModelConfig(Section):
    _section: ClassVar[str] = "model"

    layers: int = option(4, "decoder layers", at_least=1, at_most=10_000)
    hidden: int = option(256, "model dimension", at_least=1)
    heads: int = option(4, "attention heads", at_least=1)
    kv_heads: int = option(2, "key-value heads (grouped-query attention)", at_least=1)
    head_dim: Optional[int] = option(None, "width of one attention head; null: model.hidden / model.heads", at_least=2)
    qk_norm: Optional[str] = option(
        None, "RMSNorm of queries and keys before rotation: of each head, or of all heads together. null: none",
        choices=("head", "projection"),
    )  # fmt: skip
    ffn_hidden: int = option(1024, "width of a dense SwiGLU layer", at_least=1)
    vocab_size: Optional[int] = option(None, "rows of the embedding; null: the tokenizer's, padded", at_least=1)
    norm_eps: float = option(1e-5, "epsilon of RMSNorm", above=0)
    rope_theta: float = option(10000.0, "base of the rotary position embedding", above=0)
    tie_embeddings: bool = option(False, "use the input embedding as the output projection")
    init_std: float = option(0.02, "standard deviation of initial weights", above=0)
    moe: MoEConfig = field(default_factory=MoEConfig)
    router: RouterConfig = field(default_factory=RouterConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("hidden", "ffn_hidden"):
            check_multiple_of_8(f"model.{name}", getattr(self, name))
        if self.head_dim is None and (self.hidden % self.heads or self.width_of_head % 2):
            raise ConfigError(
                "model.heads", self.heads, f"must divide model.hidden ({self.hidden}) into even head dimensions",
                "change one of them, or set model.head_dim",
            )  # fmt: skip
        if self.width_of_head % 2:
            problem, cure = "must be even for rotary positions", "use an even number"
            raise ConfigError("model.head_dim", self.head_dim, problem, cure)
        if self.heads % self.kv_heads:
            cure = "use a divisor of it"
            raise ConfigError("model.kv_heads", self.kv_heads, f"must divide model.heads ({self.heads})", cure)
        self._check_experts()

    def _check_experts(self) -> None:
        moe, router, layers = self.moe, self.router, len(self.moe_layers)
        if moe.experts_by_layer and len(moe.experts_by_layer) != layers:
            cure = f"give {layers} numbers, one for each MoE layer, or none"
            raise ConfigError("model.moe.experts_by_layer", moe.experts_by_layer, "does not match the layers", cure)
        if moe.active_at_start is not None and router.kind != "top_any":
            problem = f"the {router.kind} router uses all of its experts"
            raise ConfigError("model.moe.active_at_start", moe.active_at_start, problem, "remove it")
        if layers == 0:
            return
        smallest, name_of_limit = self.smallest_layer, "model.moe.experts"
        # A ceiling that a small layer never reaches does no harm; one that no layer reaches is a mistake.
        if router.max_experts is not None and router.max_experts > self.largest_layer:
            cure = f"use at most model.moe.experts ({self.largest_layer})"
            raise ConfigError("model.router.max_experts", router.max_experts, "is more than there are experts", cure)
        limits: dict[str, float | None] = {name: getattr(router, name) for name in ("min_experts", "initial_experts")}
        if router.kind in ("top_k", "null_experts"):
            limits["k"] = router.k
        if router.kind == "null_experts":
            smallest, name_of_limit = smallest + router.num_null, "the real and null experts"
        for name, value in limits.items():
            if value is not None and value > smallest:
                cure = f"use at most {name_of_limit} ({smallest})"
                raise ConfigError(f"model.router.{name}", value, "is more than there are experts", cure)
        floor = limits.get("k", router.options.min_experts)
        if moe.ceiling is not None and floor is not None and moe.ceiling < floor and router.kind != "null_experts":
            cure = f"use at least the {floor:g} experts that every token has"
            raise ConfigError("model.moe.ceiling", moe.ceiling, "is always passed", cure)
        if moe.ceiling is None and moe.at_ceiling != "error":
            raise ConfigError("model.moe.at_ceiling", moe.at_ceiling, "there is no ceiling", "set model.moe.ceiling")

    @property
    def width_of_head(self) -> int:
        return self.head_dim or self.hidden // self.heads

    def is_moe_layer(self, layer: int) -> bool:
        return self.moe.experts > 0 and layer % self.moe.every == 0

    def experts_of(self, layer: int) -> int:
        """Expert slots of MoE layer ``layer`` (its index in the decoder)."""
        by_layer = self.moe.experts_by_layer
        return by_layer[layer // self.moe.every] if by_layer else self.moe.experts

    @property
    def smallest_layer(self) -> int:
        """Experts of the MoE layer that has the fewest."""
        return min(self.moe.experts_by_layer or [self.moe.experts])

    @property
    def largest_layer(self) -> int:
        """Experts of the MoE layer that has the most."""
        return max(self.moe.experts_by_layer or [self.moe.experts])

    @property
    def moe_size(self) -> str:
        """Experts of an MoE layer in words: one number, or the smallest to the largest."""
        return " to ".join(str(count) for count in sorted({self.smallest_layer, self.largest_layer}))

    @property
    def moe_layers(self) -> list[int]:
        """Indices of the layers that are mixtures of experts."""
        return [layer for layer in range(self.layers) if self.is_moe_layer(layer)]


@dataclass
class TrainConfig(Section):
    _section: ClassVar[str] = "train"

    steps: int = option(1000, "optimizer steps of the whole run", at_least=1)
    seed: int = option(0, "seed of initial weights and data order", at_least=0, below=2**32)
    global_batch: int = option(16, "sequences of one optimizer step, over all ranks", at_least=1)
    micro_batch: int = option(8, "sequences of one forward pass on one rank", at_least=1)
    precision: str = option("fp32", "precision of weights and activations", choices=("fp32", "bf16"))
    moe_backend: str = option(
        "auto", "what computes the experts: our Triton kernels, PyTorch's grouped products, or a loop over experts; "
        "auto: the first on a GPU, else the second", choices=("auto", "triton", "grouped_mm", "loop"),
    )  # fmt: skip
    recompute: str = option(
        "none", "what the backward pass computes again to save memory: attention (selective) or whole layers (full)",
        choices=("none", "selective", "full"),
    )  # fmt: skip


@dataclass
class OptimizerConfig(Section):
    _section: ClassVar[str] = "optimizer"

    lr: float = option(3e-4, "peak learning rate (AdamW)", above=0)
    beta1: float = option(0.9, "AdamW's first moment decay", at_least=0, below=1)
    beta2: float = option(0.95, "AdamW's second moment decay", at_least=0, below=1)
    eps: float = option(1e-8, "AdamW's epsilon", above=0)
    weight_decay: float = option(0.1, "decay of matrices; norms and router thresholds have none", at_least=0)
    clip_grad: float = option(1.0, "ceiling of the global gradient norm (0: no clipping)", at_least=0)


@dataclass
class ScheduleConfig(Section):
    _section: ClassVar[str] = "schedule"

    kind: str = option("cosine", "learning rate after warm-up", choices=("cosine", "wsd", "constant"))
    warmup_steps: int = option(100, "steps of linear warm-up", at_least=0)
    decay_fraction: float = option(0.2, "wsd: share of all steps spent in the final linear decay", above=0, at_most=1)
    min_lr_ratio: float = option(0.1, "learning rate at the end, relative to optimizer.lr", at_least=0, at_most=1)


@dataclass
class Config(Section):
    engine: str = option("deepspeed", "what runs the training", choices=("deepspeed", "megatron"))
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    adaptation: AdaptationConfig = field(default_factory=AdaptationConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.engine == "deepspeed":
            self.parallel.check_deepspeed()
            self.deepspeed.check(self.model)
        else:
            self.parallel.check_megatron(self.model, self.data.sequence_length)
            if self.parallel.context > 1 and self.train.precision != "bf16":
                problem, cure = "Transformer Engine's attention knows no other with parallel.context", "use bf16"
                raise ConfigError("train.precision", self.train.precision, problem, cure)
        self.parallel.check_experts(self.model)
        self._check_control()

    def _check_control(self) -> None:
        model, budget, adaptation = self.model, self.budget, self.adaptation
        if not model.moe_layers:
            settings = {
                "budget.method": budget.method,
                "budget.experts_per_token": budget.experts_per_token,
                "adaptation.interval": adaptation.interval,
            }
            for name, value in settings.items():
                if value not in ("none", 0, None):
                    raise ConfigError(name, value, "the model is dense", "remove it, or set model.moe.experts")
            return
        ceiling, held = model.moe.ceiling, max(budget.experts_per_token or 0, budget.start or 0)
        if ceiling is not None and held >= ceiling:
            problem = f"a budget of {held:g} experts per token passes it in every other pass"
            raise ConfigError("model.moe.ceiling", ceiling, problem, "leave room above the budget, or remove it")
        budget.check_router(model.router, model.moe.active_at_start or model.largest_layer)
        adaptation.check_run(model.router, self.train.steps)

    def check_world(self, world_size: int) -> None:
        """Checks that the parallel sizes and batches fit ``world_size`` ranks.

        Raises:
            ConfigError: naming the field that does not.
        """
        self.parallel.check_world(world_size)
        self.logging.check_installed()
        self.eval.check_installed()
        per_pass = self.train.micro_batch * self.data_parallel(world_size)
        if self.train.global_batch % per_pass:
            cure = f"use a multiple of train.micro_batch x data-parallel ranks ({per_pass})"
            raise ConfigError("train.global_batch", self.train.global_batch, "cannot be split evenly", cure)
        passes = self.accumulation(world_size)
        if self.parallel.virtual_pipeline > 1 and passes % self.parallel.pipeline:
            problem = f"gives {passes} passes a step, and the interleaved schedule needs a multiple of the stages"
            cure = f"make it a multiple of {per_pass * self.parallel.pipeline}"
            raise ConfigError("train.global_batch", self.train.global_batch, problem, cure)

    def data_parallel(self, world_size: int) -> int:
        """Ranks, or groups of ranks, that work on different sequences."""
        return world_size // self.parallel.model_parallel

    def accumulation(self, world_size: int) -> int:
        """Forward passes of one rank in one optimizer step."""
        return self.train.global_batch // (self.train.micro_batch * self.data_parallel(world_size))

    @property
    def tokens_per_step(self) -> int:
        return self.train.global_batch * self.data.sequence_length

    def to_yaml(self) -> str:
        return OmegaConf.to_yaml(OmegaConf.structured(self))

    def digest(self) -> str:
        """SHA-256 of the merged configuration, for manifests."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()
