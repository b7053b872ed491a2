"""The whole configuration, and its sections for run, data, training, optimizer and schedule."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Optional

from omegaconf import OmegaConf

from dynmoe.config.budget import AdaptationConfig, BudgetConfig
from dynmoe.config.checkpoint import CheckpointConfig
from dynmoe.config.constants import MOE_BACKENDS, MXFP8_BACKENDS, MXFP8_BLOCK
from dynmoe.config.evaluation import EvalConfig
from dynmoe.config.guard import GuardConfig
from dynmoe.config.logging import LoggingConfig
from dynmoe.config.model import ModelConfig
from dynmoe.config.parallel import DeepSpeedConfig, ParallelConfig
from dynmoe.errors import ConfigError
from dynmoe.fields import Section, option

_LONGEST_NAME = 240  # leaves room for suffixes: NAME-JOB.out, NAME.tmp-12345678


@dataclass
class RunConfig(Section):
    _section: ClassVar[str] = "run"

    name: str = option("default", "name of the run; its directory is run.dir/run.name")
    dir: str = option("runs", "parent directory of the run directories")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            cure = "use letters, digits, '.', '_' and '-', starting with a letter or digit"
            raise ConfigError("run.name", self.name, "is not a valid directory name", cure)
        if len(self.name) > _LONGEST_NAME:
            problem = f"has {len(self.name)} characters, too many for file names with a suffix"
            raise ConfigError("run.name", self.name, problem, f"use at most {_LONGEST_NAME}")

    @property
    def path(self) -> Path:
        return Path(self.dir) / self.name


@dataclass
class DataConfig(Section):
    _section: ClassVar[str] = "data"

    dirs: list[str] = option(["data/stdlib"], "one or more prepared corpora (directories written by data_prep)")
    weights: list[float] = option(
        [], "share of each corpus in the blend; empty: in proportion to their tokens", at_least=1e-9, at_most=1e9
    )
    sequence_length: int = option(512, "number of tokens of a training sequence", at_least=1)
    documents: Optional[str] = option(
        None, "what a token attends to: masked: its own document, in which positions begin at 0; joined: all earlier "
        "tokens of its sequence. null: masked, but a run that is resumed keeps what it began with",
        choices=("masked", "joined"),
    )  # fmt: skip
    packing: Optional[str] = option(
        None, "how documents fill sequences: best_fit: whole where they fit, which leaves a little padding; null: "
        "concatenated and cut", choices=("best_fit",),
    )  # fmt: skip
    predict_first_token: bool = option(
        True, "whether the first token of a document is predicted, from the end-of-text token before it"
    )
    verify: str = option(
        "once", "when to check every hash and token id of the corpora before the first step: once and after a file "
        "changes, always, or never", choices=("once", "always", "never"),
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.dirs:
            raise ConfigError("data.dirs", self.dirs, "has no corpus", "use a directory written by data_prep")
        if self.weights and len(self.weights) != len(self.dirs):
            cure = f"use {len(self.dirs)} weights or []"
            raise ConfigError("data.weights", self.weights, "must have one weight for each of data.dirs", cure)
        if self.documents == "joined" and not self.predict_first_token:
            problem = "needs documents that do not see each other"
            raise ConfigError("data.predict_first_token", False, problem, "use true, or data.documents=masked")

    @property
    def ignores_labels(self) -> bool:
        """Whether the loss leaves tokens out: the first ones of documents, or padding."""
        return self.packing is not None or not self.predict_first_token


@dataclass
class TrainConfig(Section):
    _section: ClassVar[str] = "train"

    steps: int = option(1000, "number of optimizer steps of the whole run", at_least=1)
    seed: int = option(0, "random seed of initial weights and data order", at_least=0, below=2**32)
    global_batch: int = option(16, "number of sequences of an optimizer step, over all ranks", at_least=1)
    micro_batch: int = option(8, "number of sequences of a forward pass on one rank", at_least=1)
    precision: str = option("fp32", "precision of weights and activations", choices=("fp32", "bf16"))
    moe_backend: str = option(
        "auto", "implementation of experts: our Triton kernels, grouped GEMMs of PyTorch, a loop over experts, or "
        "SonicMoE, which is a package of its own; or products with MXFP8 operands, on Blackwell or emulated; auto: "
        "Triton on a GPU, grouped GEMMs on a CPU", choices=MOE_BACKENDS,
    )  # fmt: skip
    recompute: str = option(
        "none", "activation checkpointing: recompute attention (selective) or whole layers (full) in backward",
        choices=("none", "selective", "full"),
    )  # fmt: skip
    replay: Optional[str] = option(
        None,
        "run directory, or its traces, with the experts that each token uses in each step; gates remain this run's",
    )


@dataclass
class OptimizerConfig(Section):
    _section: ClassVar[str] = "optimizer"

    kind: str = option(
        "adamw", "AdamW for all parameters; or Muon for the matrices of the decoder layers, with the learning rate and "
        "weight decay of AdamW, and AdamW for embeddings, norms and routers", choices=("adamw", "muon"),
    )  # fmt: skip
    lr: float = option(3e-4, "peak learning rate", above=0)
    beta1: float = option(0.9, "decay of AdamW's first moment", at_least=0, below=1)
    beta2: float = option(0.95, "decay of AdamW's second moment", at_least=0, below=1)
    eps: float = option(1e-8, "epsilon of AdamW", above=0)
    muon_momentum: float = option(0.95, "decay of Muon's average of the gradients", at_least=0, below=1)
    weight_decay: float = option(0.1, "weight decay of matrices; norms and router thresholds have none", at_least=0)
    clip_grad: float = option(1.0, "maximum global gradient norm (0: no clipping)", at_least=0)


@dataclass
class ScheduleConfig(Section):
    _section: ClassVar[str] = "schedule"

    kind: str = option("cosine", "learning rate schedule after warm-up", choices=("cosine", "wsd", "constant"))
    warmup_steps: int = option(100, "number of steps of linear warm-up", at_least=0)
    decay_fraction: float = option(0.2, "wsd: share of all steps that the final linear decay takes", above=0, at_most=1)
    min_lr_ratio: float = option(0.1, "final learning rate relative to optimizer.lr", at_least=0, at_most=1)


@dataclass
class Config(Section):
    engine: str = option("deepspeed", "training engine", choices=("deepspeed", "megatron"))
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

    @property
    def training_command(self) -> str:
        """The command that starts or resumes this run, whose directory exists, on as few ranks as possible."""
        return f"torchrun --nproc-per-node {self.parallel.fewest_ranks} train.py {self.run.path / 'config.yaml'}"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.engine == "deepspeed":
            self.parallel.check_deepspeed()
            self.deepspeed.check_optimizer(self.optimizer.kind)
        else:
            self.parallel.check_megatron(self.model, self.data.sequence_length)
        self.parallel.check_experts(self.model)
        if self.model.mtp.layers >= self.data.sequence_length:
            problem = f"no sequence of {self.data.sequence_length} tokens has a token so far ahead"
            raise ConfigError("model.mtp.layers", self.model.mtp.layers, problem, "use fewer")
        if self.model.moe_layers and self.train.moe_backend in MXFP8_BACKENDS:
            self._check_mxfp8(self.train.moe_backend)
        self._check_budget()
        if self.train.replay is not None:
            self._check_replay(self.train.replay)

    def _check_mxfp8(self, backend: str) -> None:
        widths = {"model.hidden": self.model.hidden, "model.moe.expert_hidden": self.model.moe.expert_hidden}
        for name, width in widths.items():
            if width % MXFP8_BLOCK:
                problem = f"does not divide into the blocks of {MXFP8_BLOCK} of train.moe_backend={backend}"
                raise ConfigError(name, width, problem, f"use a multiple of {MXFP8_BLOCK}, or another backend")
        if backend == "mxfp8" and self.train.precision != "bf16":
            problem = "train.moe_backend=mxfp8 gives results in bf16"
            raise ConfigError("train.precision", self.train.precision, problem, "use bf16, or another backend")

    def _check_budget(self) -> None:
        model = self.model
        budget = self.budget
        adaptation = self.adaptation
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
        held = max(budget.experts_per_token or 0, budget.start or 0, *model.router.budgets)
        if limit is not None and held >= limit:
            problem = f"a budget of {held:g} experts per token would exceed it in about half of the micro-batches"
            cure = "increase it well above the budget, or remove it"
            raise ConfigError("model.moe.max_mean_experts_per_token", limit, problem, cure)
        budget.check_router(model.router, model.moe.active_at_start or model.max_experts_per_layer)
        adaptation.check_run(model.router, self.train.steps)

    def _check_replay(self, replay: str) -> None:
        model = self.model
        if not model.moe_layers:
            raise ConfigError("train.replay", replay, "the model is dense", "remove it, or set model.moe.experts")
        if model.router.ADDS_OUTPUT:
            problem = f"traces do not have the part of the output that the {model.router.kind} router computes itself"
            raise ConfigError("train.replay", replay, problem, "remove it, or use another model.router.kind")
        problem = "replayed experts do not respond to it"
        if self.budget.method != "none":
            raise ConfigError("budget.method", self.budget.method, problem, "use none, or remove train.replay")
        if self.adaptation.interval:
            raise ConfigError("adaptation.interval", self.adaptation.interval, problem, "use 0, or remove train.replay")

    def check_world(self, world_size: int) -> None:
        """Raises a ConfigError if the parallel sizes or batches do not fit ``world_size`` ranks."""
        self.parallel.check_world(world_size)
        self.logging.check_installed()
        self.eval.check_installed()
        per_pass = self.train.micro_batch * self.data_parallel(world_size)
        if self.train.global_batch % per_pass:
            cure = f"use a multiple of train.micro_batch x data-parallel ranks ({per_pass})"
            raise ConfigError("train.global_batch", self.train.global_batch, "cannot be split evenly over ranks", cure)
        if self.model.moe_layers:
            self.model.router.check_tokens(per_pass * self.data.sequence_length, self.tokens_per_step)
        passes = self.accumulation(world_size)
        if self.parallel.virtual_pipeline > 1 and passes % self.parallel.pipeline:
            problem = f"gives {passes} micro-batches, not a multiple of parallel.pipeline ({self.parallel.pipeline})"
            cure = f"use a multiple of {per_pass * self.parallel.pipeline} for the interleaved schedule"
            raise ConfigError("train.global_batch", self.train.global_batch, problem, cure)

    def data_parallel(self, world_size: int) -> int:
        """Number of ranks, or groups of ranks, that process different sequences."""
        return world_size // self.parallel.model_parallel

    def accumulation(self, world_size: int) -> int:
        """Number of micro-batches of a rank in an optimizer step."""
        return self.train.global_batch // (self.train.micro_batch * self.data_parallel(world_size))

    @property
    def tokens_per_step(self) -> int:
        return self.train.global_batch * self.data.sequence_length

    def to_yaml(self) -> str:
        return OmegaConf.to_yaml(OmegaConf.structured(self))

    def digest(self) -> str:
        """SHA-256 of the merged configuration, for manifests."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()
