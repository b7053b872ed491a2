"""DeepSpeed engine: data and expert parallelism with ZeRO 0 to 3, for our model and MoE layer."""

from __future__ import annotations

import contextlib
import importlib
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read on import
import deepspeed
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import is_moe_param, split_params_into_different_moe_groups_for_optimizer
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import groups

from dynmoe.config import Config, ModelConfig
from dynmoe.config.constants import DEEPSPEED_BUCKET, DEEPSPEED_PERSISTENT, DEEPSPEED_PREFETCH
from dynmoe.data.batches import Batch
from dynmoe.engines import deepspeed_muon, deepspeed_state
from dynmoe.engines.deepspeed_zero3 import PartitionedMoELayer, PartitionedState
from dynmoe.engines.device import check_backend, take_gpu
from dynmoe.engines.loss import TextLosses, tokens_of_pass
from dynmoe.engines.patience import PATIENCE, be_patient
from dynmoe.engines.runtime import MoERuntime
from dynmoe.launched import choose_interface
from dynmoe.model import Decoder
from dynmoe.moe import MoEContext, MoEGroups, MoELayer
from dynmoe.moe.adaptation import AdaptationEvent
from dynmoe.moe.replay import RoutingReplay
from dynmoe.moe.trace import RoutingTrace
from dynmoe.train.engine import Gradients, Snapshot, StepReport
from dynmoe.train.muon import MuonAdamW
from dynmoe.train.optimizer import make_optimizer, parameter_groups


class DeepSpeedMoELayer(MoELayer, MoE):
    """Our layer as a subclass of DeepSpeed's, of which it uses nothing.

    DeepSpeed's engine finds MoE layers by ``isinstance`` to reduce expert gradients over the right group.
    """

    def __init__(self, model: ModelConfig, layer: int, seed: int, context: MoEContext) -> None:
        MoELayer.__init__(self, model, layer, seed, context)
        self.ep_size = context.groups.expert_parallel
        self.num_local_experts = self.num_experts // self.ep_size
        self.expert_group_name = _group_name(self.ep_size)
        for parameter in self.experts.parameters():
            parameter.group_name = self.expert_group_name  # type: ignore[attr-defined]

    def forward(self, x: Tensor, importance: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return MoELayer.forward(self, x, importance)

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Does nothing: the process groups already exist."""


def _group_name(expert_parallel: int) -> str:
    return f"ep_size_{expert_parallel}"


class DeepSpeedEngine:
    """Implements :class:`dynmoe.train.engine.Engine`.

    Initializes the process group if necessary (from torchrun's variables, or with a single rank), and builds model,
    optimizer and DeepSpeed's engine. Gradient norms and clipping are ours: DeepSpeed averages expert norms over ranks,
    which makes the norm and thus the training depend on the layout.
    """

    def __init__(self, config: Config, vocab_size: int) -> None:
        self.config = config
        self.device = start_processes(config)
        self.rank = self.data_rank = dist.get_rank()
        self.world_size = self.data_size = dist.get_world_size()
        torch.manual_seed(config.train.seed * self.world_size + self.rank)
        self.context = make_context(config.parallel.expert, config.train.moe_backend)
        partitions = config.deepspeed.zero_stage == 3
        self.module = Decoder(
            config.model, vocab_size, config.train.seed, self.context, config.train.recompute,
            PartitionedMoELayer if partitions else DeepSpeedMoELayer,
        )  # fmt: skip
        if partitions:
            # Gathered whole, because DeepSpeed finds no tensor in what a router returns.
            deepspeed.utils.set_z3_leaf_modules(self.module, [PartitionedMoELayer])
        param_groups = split_params_into_different_moe_groups_for_optimizer(parameter_groups(self.module, config))
        self._adam = make_optimizer([group for group in param_groups if group["params"]], config.optimizer)
        parameters = [list(group["params"]) for group in self._adam.param_groups]
        with deepspeed_muon.introduced(self._adam):
            self._engine, self._optimizer, *_ = deepspeed.initialize(
                model=self.module, optimizer=self._adam, config=self._deepspeed_config()
            )
        be_patient()
        muon = (own for group, own in zip(self._adam.param_groups, parameters, strict=True) if group["muon"])
        by_muon = frozenset(id(parameter) for own in muon for parameter in own)
        self.state = (
            PartitionedState(self._optimizer, self._adam)
            if partitions
            else deepspeed_state.OptimizerState(self._optimizer, self._adam, by_muon)
        )
        if isinstance(self._adam, MuonAdamW):
            deepspeed_muon.connect(
                config, self.module, self._adam, parameters, self.state,
                self.context.groups.tokens, expert_replicas(config.parallel.expert),
            )  # fmt: skip
        self.layers = self.module.moe_layers
        self.local_modules: Sequence[nn.Module] = [layer.get_submodule("attention") for layer in self.module.layers]
        named = self.module.named_parameters()
        self.moe = MoERuntime(config, self.layers, self.context, self.state, named, self.device)
        self._batches: Sequence[Batch] = ()
        self._total_tokens: Tensor | None = None
        self.step = 0  # on the host: reading the optimizer's count would wait for the device
        self._local_loss = torch.zeros((), device=self.device)
        self._grad_norm = 0.0

    def _deepspeed_config(self) -> dict[str, Any]:
        train = self.config.train
        stage = self.config.deepspeed.zero_stage
        bf16 = train.precision == "bf16"
        # DeepSpeed requires an even size; an odd number of experts can have an odd number of parameters.
        bucket = min(DEEPSPEED_BUCKET, 2 * -(-sum(parameter.numel() for parameter in self.module.parameters()) // 2))
        return {
            "train_micro_batch_size_per_gpu": train.micro_batch,
            "gradient_accumulation_steps": self.config.accumulation(self.world_size),
            "gradient_clipping": 0.0,  # see update
            "zero_optimization": {
                "stage": stage,
                "overlap_comm": False,
                # DeepSpeed allocates a whole bucket in every step (2 GB by default).
                "reduce_bucket_size": bucket,
                "allgather_bucket_size": bucket,
                # Only ZeRO 3 reads these. It keeps nothing larger between a forward and a backward pass.
                "stage3_param_persistence_threshold": DEEPSPEED_PERSISTENT,
                "stage3_prefetch_bucket_size": DEEPSPEED_PREFETCH,
                "stage3_max_reuse_distance": 0,
            },
            "bf16": {"enabled": bf16},
            # DeepSpeed has no fp32 accumulation for stage 0 in bf16.
            "data_types": {"grad_accum_dtype": "fp32" if not bf16 or stage else "bf16"},
            "steps_per_print": sys.maxsize,
            "zero_allow_untested_optimizer": True,  # DeepSpeed knows optimizers by their exact class
        }

    def compute_gradients(
        self, batches: Sequence[Batch], record: bool, trace: RoutingTrace | None = None,
        replay: RoutingReplay | None = None,
    ) -> Gradients:  # fmt: skip
        self.step += 1
        self.module.train()
        batches = [batch.looking_ahead(self.config.model.mtp.layers) for batch in batches]
        self._batches = batches
        self._total_tokens = tokens_of_pass(batches, self.config.data, self.device)
        # One micro-batch of each rank is sure to fit in memory.
        first = batches[0].to(self.device)
        self.moe.calibrate(lambda: self.module(*self._inputs(first)))
        losses = []
        losses_ahead = [torch.zeros((), device=self.device)]
        with self.moe.step(self.step, 1.0 / len(batches), record, trace, replay):
            for number, batch in enumerate(batches):
                on_device = batch.to(self.device)
                with self.moe.micro_batch(number):
                    loss = self._engine(*self._inputs(on_device))
                self._engine.backward(loss)
                losses.append(loss.detach())
                if self.module.loss_ahead is not None:
                    losses_ahead.append(self.module.loss_ahead)
                if batch is not batches[-1]:
                    self._engine.step()  # not an accumulation boundary: only counts the micro-batch
        self._local_loss = torch.stack(losses).mean()
        squares = torch.zeros((), dtype=torch.float64, device=self.device)
        for gradient, copies in self._gradients():
            squares += gradient.float().square().sum(dtype=torch.float64) / copies
        loss_ahead = torch.stack(losses_ahead).sum() / len(batches)
        sums = torch.stack([squares, *(loss.double() / self.world_size for loss in (self._local_loss, loss_ahead))])
        dist.all_reduce(sums)
        square, lm_loss, mtp_loss = sums.tolist()
        self._grad_norm = math.sqrt(square)
        return Gradients(lm_loss, self._grad_norm, mtp_loss)

    def update(self, lr: float) -> list[AdaptationEvent]:
        max_norm = self.config.optimizer.clip_grad
        factor = min(1.0, max_norm / (self._grad_norm + 1e-6)) if max_norm > 0 else 1.0
        if factor < 1:
            for gradient, _ in self._gradients():
                gradient.mul_(factor)
        for group in self._adam.param_groups:
            group["lr"] = lr * group["lr_factor"]
        self._engine.step()
        return self.moe.apply_step(self.step)

    def skip(self) -> list[AdaptationEvent]:
        optimizer = self._optimizer
        if isinstance(optimizer, DeepSpeedZeroOptimizer):
            optimizer._release_preflattened_grad_buffers()
            for group in optimizer.averaged_gradients:
                optimizer.averaged_gradients[group] = optimizer.all_grad_tensors[group] = None
        elif isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
            optimizer.averaged_gradients = {}
        with _disabled_step(optimizer):
            self._engine.step()  # counts the step and clears gradients
        return self.moe.skip_step(self.step)

    def describe_nonfinite(self) -> str:
        return self.moe.describe_nonfinite(self._repeat, self.step, self._local_loss, self._grad_norm)

    def _repeat(self) -> None:
        """Repeats the forward and backward passes of the last step without counts.

        Gradients are zeros by then (:class:`GradientWatch`). Only ZeRO 3 adds them to those of the step, as its layers
        can compute no others.
        """
        parameters = list(self.module.parameters())
        for number, batch in enumerate(self._batches):
            on_device = batch.to(self.device)
            with self.moe.recompute(number):
                if isinstance(self._optimizer, DeepSpeedZeroOptimizer_Stage3):
                    self._engine.backward(self._engine(*self._inputs(on_device)))
                else:
                    loss = self.module(*self._inputs(on_device))
                    torch.autograd.grad(loss / len(self._batches), parameters, allow_unused=True)

    def _inputs(self, batch: Batch) -> tuple[Any, ...]:
        """Arguments of the model's loss."""
        ahead = [(further.tokens_BS, further.labels_BS) for further in batch.ahead]
        return batch.tokens_BS, batch.labels_BS, batch.start_BS, self._total_tokens, ahead

    def _gradients(self) -> Iterator[tuple[Tensor, int]]:
        """Yields the reduced gradients on this rank, each with the number of ranks that hold a copy."""
        if isinstance(self._optimizer, (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3)):
            for partition in self._optimizer.averaged_gradients.values():
                yield from ((gradient, 1) for gradient in partition or ())
        elif isinstance(self._optimizer, BF16_Optimizer):
            yield from ((gradient, 1) for gradient in self._optimizer.fp32_groups_gradient_flat_partition)
        else:
            for parameter in self.module.parameters():
                shards = self.context.groups.expert_parallel if is_moe_param(parameter) else 1
                if parameter.grad is not None:
                    yield parameter.grad, self.world_size // shards

    def positions(self, length: int) -> Tensor:
        return torch.arange(length)

    def report(self) -> StepReport:
        return self.moe.report()

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch], texts: Sequence[int], num_texts: int) -> list[float]:
        self.module.eval()
        losses = TextLosses(num_texts, self.device)
        for batch, text in zip(batches, texts, strict=True):
            own = batch.to(self.device)
            losses.add(text, self.module(own.tokens_BS, own.labels_BS, own.start_BS), own.labels_BS)
        return losses.means()

    @torch.no_grad()
    def logits(self, tokens_BS: Tensor) -> Tensor:
        self.module.eval()
        return self.module(tokens_BS.to(self.device))

    def snapshot(self, directory: Path) -> Snapshot:
        return deepspeed_state.snapshot(directory, self.module, self.state, self.context)

    def load(self, directory: Path) -> None:
        deepspeed_state.load(directory, self.module, self.state)
        self.step = self.state.step


@contextlib.contextmanager
def _disabled_step(optimizer: Any) -> Iterator[None]:
    step = optimizer.step
    optimizer.step = lambda *arguments, **options: None
    try:
        yield
    finally:
        optimizer.step = step


def start_processes(config: Config | None = None) -> torch.device:
    """Joins the process group of the launcher, or creates one of a single rank; returns this rank's device.

    Raises:
        ConfigError: see :func:`check_backend`.
    """
    choose_interface()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if "RANK" not in os.environ:
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        os.environ.update(alone)
    cuda = os.environ.get("DS_ACCELERATOR") != "cpu"
    device = take_gpu(", or set DS_ACCELERATOR=cpu") if cuda else torch.device("cpu")
    check_backend(config, device)
    # DeepSpeed's shared-memory collectives need a compiler and leave files in shared memory if a rank is killed; gloo
    # does neither. Without this list, DeepSpeed also runs a compiler to find out which of its operators could be built.
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    _load_muon()
    if not dist.is_initialized() or deepspeed.comm.comm.cdb is None:
        backend = "nccl" if cuda else "gloo"
        deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False, timeout=PATIENCE)
    return device


def _load_muon() -> None:
    """Imports DeepSpeed's Muon, as DeepSpeed does for every optimizer, but without TorchInductor.

    Its functions are decorated by ``torch.compile``, whose first use loads the compiler. That takes a second, and this
    engine has a Muon of its own.
    """
    name = "TORCHDYNAMO_DISABLE"  # read by torch.compile while it decorates
    before = os.environ.get(name)
    os.environ[name] = "1"
    with contextlib.suppress(ImportError):  # a version of DeepSpeed without it
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    if before is None:
        del os.environ[name]
    else:
        os.environ[name] = before


def make_context(expert_parallel: int, backend: str = "auto") -> MoEContext:
    """The context of a model whose experts are spread over ``expert_parallel`` ranks."""
    name = _group_name(expert_parallel)
    if name not in groups._get_expert_parallel_group_dict():
        groups._create_expert_and_data_parallel(expert_parallel)
    expert_group = groups._get_expert_parallel_group(name) if expert_parallel > 1 else None
    tokens = dist.group.WORLD if dist.get_world_size() > 1 else None
    return MoEContext(MoEGroups(expert_group, tokens), backend)


def expert_replicas(expert_parallel: int) -> dist.ProcessGroup | None:
    """The ranks with the same experts as this one; None for this one alone."""
    ranks = groups._get_expert_data_parallel_group(_group_name(expert_parallel))
    return ranks if dist.get_world_size(ranks) > 1 else None
