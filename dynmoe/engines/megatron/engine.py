"""Megatron-Core: tensor, pipeline, context, expert and data parallelism around our MoE layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.utils import get_attr_wrapped_model, get_model_config
from torch import Tensor, nn

from dynmoe.config import Config
from dynmoe.data.batches import Batch
from dynmoe.engines.megatron import checkpoint
from dynmoe.engines.megatron.groups import context_positions, make_context, make_groups, start_processes
from dynmoe.engines.megatron.model import build_chunks
from dynmoe.engines.megatron.optimizer import OptimizerState, clip, make_optimizer, set_learning_rate
from dynmoe.engines.megatron.versions import distribute
from dynmoe.engines.megatron.weights import moe_layers, weights
from dynmoe.engines.nonfinite import GradientWatch, describe_nonfinite
from dynmoe.engines.reports import reduce_report
from dynmoe.errors import ConfigError
from dynmoe.moe.adaptation import AdaptationEvent
from dynmoe.moe.control import RoutingControl
from dynmoe.train.engine import Gradients, Snapshot, StepReport


class MegatronEngine:
    """Fulfils :class:`dynmoe.train.engine.Engine`.

    Starts the process group where none exists (from torchrun's variables, or alone) and builds this rank's part of the
    model. Every rank reads the batches of its data-parallel group; the stages take from them what they need.
    """

    def __init__(self, config: Config, vocab_size: int) -> None:
        if vocab_size % config.parallel.tensor:
            problem = f"does not divide the rows of the embedding ({vocab_size})"
            raise ConfigError("parallel.tensor", config.parallel.tensor, problem, "set model.vocab_size to a multiple")
        self.config = config
        self.device = start_processes()
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        torch.manual_seed(config.train.seed * self.world_size + self.rank)
        make_groups(config.parallel, config.train.seed)
        self.data_rank = parallel_state.get_data_parallel_rank()
        self.data_size = parallel_state.get_data_parallel_world_size()
        self.context = make_context(config.train.moe_backend)
        ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
        parts = build_chunks(config, vocab_size, self.context, self.device)
        self.models = [get_attr_wrapped_model(part, "decoder", return_model_obj=True) for part in parts]
        settings = get_model_config(parts[0])
        self._chunks = [
            distribute(settings, ddp, part, disable_bucketing=number > 0) for number, part in enumerate(parts)
        ]
        self.optimizer = make_optimizer(config, self._chunks)
        settings.finalize_model_grads_func = finalize_model_grads
        settings.grad_scale_func = self.optimizer.scale_loss
        self.state = OptimizerState(self.optimizer)
        self.layers = [layer for model in self.models for layer in moe_layers(model)]
        for model in self.models:  # the counts of all its layers, while what follows is computed
            model.decoder.register_forward_hook(lambda *_: self.context.start_counts())
        # Projections around it have collectives under tensor parallelism.
        self.local_modules: Sequence[nn.Module] = [
            layer.self_attention.core_attention for m in self.models for layer in m.decoder.layers
        ]
        self._control = RoutingControl(config, self.layers, self.context, self.state, self.device)
        self._vocab_size, self._context_rank = vocab_size, parallel_state.get_context_parallel_rank()
        named = ((own.name, own.parameter) for model in self.models for own in weights(model, config.model))
        self._watch = GradientWatch(named, self.layers)
        self._batches: Sequence[Batch] = ()
        self.step = self.updates = 0  # steps, and those that the optimizer took
        self._local_loss = torch.zeros((), device=self.device)
        self._grad_norm, self._recorded = 0.0, False

    def compute_gradients(self, batches: Sequence[Batch], record: bool) -> Gradients:
        self.step += 1
        self._set_mode(training=True)
        if self._control.needs_calibration:
            self._calibrate(batches[0])
        self._control.begin_step(self.step)
        self._batches = batches
        self.context.recording = self._recorded = record
        # Tensor-parallel ranks have different tokens; gradients of what is not spread over them are added up.
        self.context.loss_scale = 1.0 / (len(batches) * self.config.parallel.tensor)
        losses = self._accumulate(batches)
        self.context.recording = False
        self.optimizer.prepare_grads()
        self._grad_norm = float(self.optimizer.get_grad_norm())
        self._local_loss = torch.stack(losses).mean() if losses else torch.zeros((), device=self.device)
        lm_loss = self._local_loss.double() / self._ranks_with_loss
        dist.all_reduce(lm_loss)
        return Gradients(lm_loss.item(), self._grad_norm)

    def _accumulate(self, batches: Sequence[Batch]) -> list[Tensor]:
        """Gradients of ``batches``, reduced, and the losses of :meth:`_run`."""
        for chunk in self._chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        return self._run(batches, forward_only=False)

    def update(self, lr: float) -> list[AdaptationEvent]:
        clip(self.optimizer, self.config.optimizer.clip_grad, self._grad_norm)
        set_learning_rate(self.optimizer, lr)
        self.optimizer.step_with_ready_grads()
        self.updates += 1
        return self._control.end_step(self.step)

    def skip(self) -> list[AdaptationEvent]:
        return self._control.skip_step(self.step)  # gradients are cleared before the next step

    def describe_nonfinite(self) -> str:
        finite = bool(torch.isfinite(self._local_loss))
        return describe_nonfinite(
            self.config.model, self.layers, self._watch, self._repeat, self.step, finite, self._grad_norm
        )

    def _repeat(self) -> None:
        """The passes of the latest step once more: nothing is counted, and the next step clears the gradients."""
        with self.context.recompute(0):
            self._accumulate(self._batches)

    def _set_mode(self, training: bool) -> None:
        for chunk in self._chunks:
            chunk.train(training)

    @torch.no_grad()
    def _calibrate(self, batch: Batch) -> None:
        """A pass in which threshold routers set their thresholds, each from what the layers before it give.

        One micro-batch of each rank: all that fits in memory for sure.
        """
        self.context.calibrating = True
        self._run([batch], forward_only=True)
        self.context.calibrating = False

    def _run(self, batches: Sequence[Batch], forward_only: bool, logits: bool = False) -> list[Tensor]:
        """Megatron's schedule over ``batches``: the loss of each, or its logits; [] where the last stage is elsewhere.

        The interleaved schedule takes a multiple of the stages: evaluation repeats the last batch and forgets it.
        """
        interleaved = len(self._chunks) > 1
        fill = -len(batches) % self.config.parallel.pipeline if interleaved else 0
        filled = [self._on_this_context_rank(batch) for batch in [*batches, *[batches[-1]] * fill]]
        iterators = [iter(enumerate(filled)) for _ in self._chunks]

        def forward(batches: Iterator[tuple[int, Batch]], chunk: Any) -> tuple[Tensor, Callable[..., Any]]:
            self.context.micro_batch, batch = next(batches)
            labels = None if logits else batch.labels_BS
            return chunk(batch.tokens_BS, None, None, labels=labels), self._logits if logits else self._loss

        rows, length = batches[0].tokens_BS.shape
        made = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iterators if interleaved else iterators[0],
            model=self._chunks,
            num_microbatches=len(filled),
            seq_length=length,
            micro_batch_size=rows,
            forward_only=forward_only,
            collect_non_loss_data=logits,
        )
        return made[: len(batches)]

    def _loss(self, loss_BS: Tensor) -> tuple[Tensor, Tensor]:
        """What is differentiated and what is reported; Megatron multiplies the first by the context-parallel size."""
        loss = loss_BS.float().mean()
        return loss / self.config.parallel.context, loss.detach()

    def _logits(self, logits_BSV: Tensor, non_loss_data: bool = True) -> Tensor:
        return gather_from_tensor_model_parallel_region(logits_BSV)

    def _on_this_context_rank(self, batch: Batch) -> Batch:
        """On the device, with the positions that this context-parallel rank computes."""
        batch, ranks = batch.to(self.device), self.config.parallel.context
        if ranks == 1:
            return batch
        positions = context_positions(batch.tokens_BS.shape[1], ranks, self._context_rank).to(self.device)
        return Batch(batch.tokens_BS[:, positions], batch.labels_BS[:, positions])

    def positions(self, length: int) -> Tensor:
        parallel = self.config.parallel
        held = context_positions(length, parallel.context, self._context_rank)
        return held.chunk(parallel.tensor)[parallel_state.get_tensor_model_parallel_rank()]  # sequence parallelism

    def synchronize_parameters(self) -> None:
        """Brings together the parameters of which each data-parallel rank has set its shard."""
        for chunk in self._chunks:
            chunk.start_param_sync(force_sync=True)

    def report(self) -> StepReport:
        recorded, self._recorded = self._recorded, False
        return reduce_report(self.config.model, self.layers, recorded, self.device)

    @property
    def _ranks_with_loss(self) -> int:
        """Ranks of the last stage: each has the loss of its data-parallel group, or of its part of the sequences."""
        return self.world_size // self.config.parallel.pipeline

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch], texts: Sequence[int], per_rank: Sequence[float]) -> list[float]:
        self._set_mode(training=False)
        losses = self._run(batches, forward_only=True)
        totals = torch.zeros(len(per_rank), dtype=torch.float64, device=self.device)
        if losses:
            totals.index_add_(0, torch.tensor(texts, device=self.device), torch.stack(losses).double())
            totals /= torch.tensor(per_rank, dtype=torch.float64, device=self.device)
        dist.all_reduce(totals)
        return [total / self._ranks_with_loss for total in totals.tolist()]

    @torch.no_grad()
    def logits(self, tokens_BS: Tensor) -> Tensor:
        self._set_mode(training=False)
        parallel, (rows, length) = self.config.parallel, tokens_BS.shape
        padded_BS = F.pad(tokens_BS, (0, -length % parallel.sequence_parts))  # no position sees what comes after it
        made = self._run([Batch(padded_BS, padded_BS)], forward_only=True, logits=True)
        whole_BSV = torch.empty(rows, padded_BS.shape[1], self._vocab_size, device=self.device)
        if made:
            parts = [torch.empty_like(made[0]) for _ in range(parallel.context)]
            dist.all_gather(parts, made[0], group=parallel_state.get_context_parallel_group())
            for rank, part_BSV in enumerate(parts):
                whole_BSV[:, context_positions(padded_BS.shape[1], parallel.context, rank)] = part_BSV
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast(whole_BSV, last, group=parallel_state.get_pipeline_model_parallel_group())
        return whole_BSV[:, :length]

    def snapshot(self, directory: Path) -> Snapshot:
        return checkpoint.snapshot(directory, self)

    def load(self, directory: Path) -> None:
        checkpoint.load(directory, self)
