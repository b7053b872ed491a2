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

from dynmoe.config.fields import Section, option
from dynmoe.errors import ConfigError


def _check_multiple_of_8(name: str, value: int) -> None:
    if value % 8:
        cure = "use a multiple of 8"
        raise ConfigError(name, value, "gives rows that grouped matrix products cannot read (16-byte strides)", cure)


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

    @property
    def path(self) -> Path:
        return Path(self.dir) / self.name


@dataclass
class DataConfig(Section):
    _section: ClassVar[str] = "data"

    dirs: list[str] = option(["data/stdlib"], "prepared corpora (directories written by data_prep), one or several")
    weights: list[float] = option(
        [], "share of each corpus in the blend; empty: in proportion to their tokens", above=0
    )
    sequence_length: int = option(512, "tokens of one training sequence", at_least=1)
    verify: bool = option(True, "check every hash and token id of the corpora before the first step")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.dirs:
            raise ConfigError("data.dirs", self.dirs, "names no corpus", "name a directory written by data_prep")
        if self.weights and len(self.weights) != len(self.dirs):
            cure = f"give {len(self.dirs)} weights (one for each of data.dirs) or none"
            raise ConfigError("data.weights", self.weights, "does not match data.dirs", cure)


@dataclass
class RouterConfig(Section):
    _section: ClassVar[str] = "model.router"

    kind: str = option("top_p", "how experts are chosen for a token", choices=("top_k", "top_p", "top_any"))
    k: int = option(2, "top_k: experts per token", at_least=1)
    p: float = option(0.4, "top_p: probability mass that the chosen experts reach", above=0, at_most=1)
    form: str = option(
        "paper", "top_p, top_any: the paper's definition, or what its released code does", choices=("paper", "released")
    )
    renormalize: bool = option(False, "top_k, top_p: make the gates of a token sum to 1")
    min_experts: int = option(1, "top_p, top_any: floor of experts per token (0 lets a token use none)", at_least=0)
    max_experts: Optional[int] = option(None, "top_p, top_any: ceiling of experts per token", at_least=1)
    scale: float = option(1.0, "top_any: factor on cosine scores and thresholds inside the sigmoid", above=0)
    balance_loss: Optional[float] = option(None, "coefficient of the load-balancing loss", at_least=0)
    entropy_loss: Optional[float] = option(None, "top_k, top_p: coefficient of the router entropy", at_least=0)
    z_loss: Optional[float] = option(None, "top_k, top_p: coefficient of the router z-loss", at_least=0)
    diversity_loss: Optional[float] = option(None, "top_any: coefficient of prototype diversity", at_least=0)
    simplicity_loss: Optional[float] = option(None, "top_any: coefficient of prototype norms", at_least=0)
    efficiency_loss: Optional[float] = option(None, "top_any: coefficient of the mean gate", at_least=0)
    lr_factor: float = option(1.0, "learning rate of router weights relative to optimizer.lr", above=0)

    _DEFAULT_COEFFICIENTS: ClassVar[dict[tuple[str, str], dict[str, float]]] = {
        # arXiv 2403.07652, section 3.3 (alpha, beta); the switch loss for top_k; arXiv 2405.14297 for top_any,
        # whose released code since January 2025 adds the last two.
        ("top_k", "paper"): {"balance": 1e-2},
        ("top_p", "paper"): {"balance": 1e-2, "entropy": 1e-4},
        ("top_any", "paper"): {"diversity": 1e-2, "simplicity": 1e-2},
        ("top_k", "released"): {"balance": 1e-2},
        ("top_p", "released"): {"balance": 1e-2, "entropy": 1e-4},
        ("top_any", "released"): {"diversity": 1e-2, "simplicity": 1e-2, "balance": 1e-2, "efficiency": 1e-2},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        path = self._section
        if self.max_experts is not None and self.max_experts < self.min_experts:
            cure = f"use at least model.router.min_experts ({self.min_experts})"
            raise ConfigError(f"{path}.max_experts", self.max_experts, "is below the floor", cure)
        if self.kind == "top_p" and self.min_experts < 1:
            raise ConfigError(f"{path}.min_experts", self.min_experts, "top_p always selects one", "use 1 or more")
        foreign = ("entropy_loss", "z_loss") if self.kind == "top_any" else (
            "diversity_loss", "simplicity_loss", "efficiency_loss")  # fmt: skip
        for name in foreign:
            if getattr(self, name):
                raise ConfigError(
                    f"{path}.{name}", getattr(self, name), f"has no meaning for the {self.kind} router", "remove it"
                )

    @property
    def loss_coefficients(self) -> dict[str, float]:
        """Coefficient of every auxiliary loss in force: the given one, else the one of the router's paper."""
        names = ("balance", "entropy", "z", "diversity", "simplicity", "efficiency")
        defaults = self._DEFAULT_COEFFICIENTS[self.kind, self.form]
        given = {name: getattr(self, f"{name}_loss") for name in names}
        merged = {name: defaults.get(name, 0.0) if value is None else value for name, value in given.items()}
        return {name: value for name, value in merged.items() if value > 0}


@dataclass
class MoEConfig(Section):
    _section: ClassVar[str] = "model.moe"

    experts: int = option(16, "experts of one MoE layer (0: a dense model)", at_least=0)
    expert_hidden: int = option(512, "width of one SwiGLU expert", at_least=1)
    shared_hidden: int = option(0, "width of a shared expert that every token uses (0: none)", at_least=0)
    every: int = option(1, "an MoE layer in every n-th layer, the first included; dense SwiGLU elsewhere", at_least=1)
    capacity_factor: Optional[float] = option(
        None, "limit of routes per expert and rank in training, relative to perfect balance; null: none", above=0
    )
    drop_policy: str = option(
        "probs", "which routes to drop beyond capacity: lowest score, or last position", choices=("probs", "position")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("expert_hidden", "shared_hidden"):
            _check_multiple_of_8(f"model.moe.{name}", getattr(self, name))


@dataclass
class ModelConfig(Section):
    _section: ClassVar[str] = "model"

    layers: int = option(4, "decoder layers", at_least=1)
    hidden: int = option(256, "model dimension", at_least=1)
    heads: int = option(4, "attention heads", at_least=1)
    kv_heads: int = option(2, "key-value heads (grouped-query attention)", at_least=1)
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
            _check_multiple_of_8(f"model.{name}", getattr(self, name))
        if self.hidden % self.heads or self.head_dim % 2:
            raise ConfigError(
                "model.heads", self.heads, f"must divide model.hidden ({self.hidden}) into even head dimensions",
                "change one of them",
            )  # fmt: skip
        if self.heads % self.kv_heads:
            cure = "use a divisor of it"
            raise ConfigError("model.kv_heads", self.kv_heads, f"must divide model.heads ({self.heads})", cure)
        experts, router = self.moe.experts, self.router
        if experts and router.kind == "top_k" and router.k > experts:
            cure = f"use at most model.moe.experts ({experts})"
            raise ConfigError("model.router.k", router.k, "is more than there are experts", cure)
        for name in ("min_experts", "max_experts"):
            value = getattr(router, name)
            if experts and value is not None and value > experts:
                cure = f"use at most model.moe.experts ({experts})"
                raise ConfigError(f"model.router.{name}", value, "is more than there are experts", cure)

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    def is_moe_layer(self, layer: int) -> bool:
        return self.moe.experts > 0 and layer % self.moe.every == 0

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
    recompute: bool = option(False, "activation checkpointing: recompute each layer in the backward pass")


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
class ParallelConfig(Section):
    _section: ClassVar[str] = "parallel"

    expert: int = option(1, "expert-parallel size: ranks over which the experts of a layer are spread", at_least=1)
    tensor: int = option(1, "tensor-parallel size (engine=megatron)", at_least=1)
    pipeline: int = option(1, "pipeline-parallel size (engine=megatron)", at_least=1)


@dataclass
class DeepSpeedConfig(Section):
    _section: ClassVar[str] = "deepspeed"

    zero_stage: int = option(1, "ZeRO stage: 0, 1 (optimizer state) or 2 (and gradients) spread over ranks", at_least=0)


@dataclass
class EvalConfig(Section):
    _section: ClassVar[str] = "eval"

    interval: int = option(100, "steps between evaluations (0: only at the end)", at_least=0)
    batches: int = option(10, "global batches of one evaluation", at_least=1)


@dataclass
class CheckpointConfig(Section):
    _section: ClassVar[str] = "checkpoint"

    interval: int = option(200, "steps between checkpoints (0: only at the end and on SIGTERM)", at_least=0)
    keep: int = option(2, "newest checkpoints that are kept", at_least=2)


@dataclass
class LoggingConfig(Section):
    _section: ClassVar[str] = "logging"

    interval: int = option(10, "steps between rows of metrics.jsonl", at_least=1)
    wandb: str = option("disabled", "Weights & Biases", choices=("disabled", "offline", "online"))
    wandb_project: str = option("dynmoe", "W&B project")
    peak_tflops: Optional[float] = option(None, "peak of one device for train/mfu; null: by GPU name", above=0)


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
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_engine()
        self._check_experts()

    def _check_engine(self) -> None:
        if self.engine == "megatron":
            raise ConfigError("engine", self.engine, "is not available in this version", "use engine=deepspeed")
        for name in ("tensor", "pipeline"):
            size = getattr(self.parallel, name)
            if size > 1:
                problem = "DeepSpeed runs expert and data parallelism only"
                raise ConfigError(f"parallel.{name}", size, problem, f"set parallel.{name}=1")
        stage = self.deepspeed.zero_stage
        if stage == 3 and self.model.moe.experts:
            problem = "ZeRO 3 shards parameters, which expert parallelism already does, and DeepSpeed cannot do both"
            raise ConfigError("deepspeed.zero_stage", stage, problem, "use 0, 1 or 2, and a larger parallel.expert")
        if stage > 2:
            raise ConfigError("deepspeed.zero_stage", stage, "is not offered", "use 0, 1 or 2")

    def _check_experts(self) -> None:
        experts, size = self.model.moe.experts, self.parallel.expert
        if size > 1 and (experts == 0 or experts % size):
            cure = f"use a divisor of model.moe.experts ({experts})" if experts else "set it to 1: the model is dense"
            raise ConfigError("parallel.expert", size, "cannot spread the experts evenly", cure)

    def check_world(self, world_size: int) -> None:
        """Checks that the parallel sizes and batches fit ``world_size`` ranks.

        Raises:
            ConfigError: naming the field that does not.
        """
        if world_size % self.parallel.expert:
            cure = f"use a divisor of the number of ranks ({world_size})"
            raise ConfigError("parallel.expert", self.parallel.expert, "does not divide the ranks", cure)
        per_pass = self.train.micro_batch * world_size
        if self.train.global_batch % per_pass:
            cure = f"use a multiple of train.micro_batch x data-parallel ranks ({per_pass})"
            raise ConfigError("train.global_batch", self.train.global_batch, "cannot be split evenly", cure)

    def accumulation(self, world_size: int) -> int:
        """Forward passes of one rank in one optimizer step."""
        return self.train.global_batch // (self.train.micro_batch * world_size)

    @property
    def tokens_per_step(self) -> int:
        return self.train.global_batch * self.data.sequence_length

    def to_yaml(self) -> str:
        return OmegaConf.to_yaml(OmegaConf.structured(self))

    def digest(self) -> str:
        """SHA-256 of the merged configuration, for manifests."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()
