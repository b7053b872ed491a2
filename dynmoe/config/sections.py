"""The sections of the configuration, each a dataclass that checks itself."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from omegaconf import OmegaConf

from dynmoe.config.checkpoint import CheckpointConfig
from dynmoe.config.constants import MOE_BACKENDS
from dynmoe.config.control import AdaptationConfig, BudgetConfig
from dynmoe.config.evaluation import EvalConfig
from dynmoe.config.guard import GuardConfig
from dynmoe.config.logging import LoggingConfig
from dynmoe.config.model import ModelConfig
from dynmoe.config.parallel import DeepSpeedConfig, ParallelConfig
from dynmoe.errors import ConfigError
from dynmoe.fields import Section, option

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
class TrainConfig(Section):
    _section: ClassVar[str] = "train"

    steps: int = option(1000, "optimizer steps of the whole run", at_least=1)
    seed: int = option(0, "seed of initial weights and data order", at_least=0, below=2**32)
    global_batch: int = option(16, "sequences of one optimizer step, over all ranks", at_least=1)
    micro_batch: int = option(8, "sequences of one forward pass on one rank", at_least=1)
    precision: str = option("fp32", "precision of weights and activations", choices=("fp32", "bf16"))
    moe_backend: str = option(
        "auto", "what computes the experts: our Triton kernels, PyTorch's grouped products, or a loop over experts; "
        "auto: the first on a GPU, else the second", choices=MOE_BACKENDS,
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
        limit = model.moe.max_mean_experts_per_token
        held = max(budget.experts_per_token or 0, budget.start or 0)
        if limit is not None and held >= limit:
            problem = f"a budget of {held:g} experts per token exceeds it in every other micro-batch"
            cure = "leave room above the budget, or remove it"
            raise ConfigError("model.moe.max_mean_experts_per_token", limit, problem, cure)
        budget.check_router(model.router, model.moe.active_at_start or model.max_experts_per_layer)
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
