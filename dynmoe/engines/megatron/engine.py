"""Megatron-Core engine: tensor, pipeline, context, expert and data parallelism around our MoE layer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.utils import get_attr_wrapped_model, get_model_config
from torch import Tensor, nn

from dynmoe.config import Config
from dynmoe.data.batches import Batch
from dynmoe.engines.loss import TextLosses, counts_BS, tokens_of_pass
from dynmoe.engines.megatron import checkpoint, muon
from dynmoe.engines.megatron.groups import context_positions, make_context, make_groups, start_processes
from dynmoe.engines.megatron.model import build_chunks
from dynmoe.engines.megatron.multi_token import finalize_gradients, share_embedding
from dynmoe.engines.megatron.optimizer import OptimizerState, clip_gradients, make_optimizer, set_learning_rate
from dynmoe.engines.megatron.versions import wrap_with_ddp
from dynmoe.engines.megatron.weights import moe_layers, weights
from dynmoe.engines.runtime import MoERuntime
from dynmoe.errors import ConfigError
from dynmoe.model.documents import Documents
from dynmoe.moe.adaptation import AdaptationEvent
from dynmoe.moe.replay import RoutingReplay
from dynmoe.moe.trace import RoutingTrace
from dynmoe.train.engine import Gradients, Snapshot, StepReport
from dynmoe.train.optimizer import parameter_groups


class MegatronEngine:
    """Implements :class:`dynmoe.train.engine.Engine`.

    Initializes the process group if there is none (from torchrun's variables, or with a single rank) and builds this
    rank's model chunks. Every rank reads the batches of its data-parallel rank; pipeline stages use what they need.
    """

    def __init__(self, config: Config, vocab_size: int) -> None:
        if vocab_size % config.parallel.tensor:
            problem = f"must divide the number of embedding rows ({vocab_size})"
            raise ConfigError("parallel.tensor", config.parallel.tensor, problem, "set model.vocab_size to a multiple")
        self.config = config
        self.device = start_processes(config)
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        torch.manual_seed(config.train.seed * self.world_size + self.rank)
        make_groups(config.parallel, config.train.seed)
        self.data_rank = parallel_state.get_data_parallel_rank()
        self.data_size = parallel_state.get_data_parallel_world_size()
        self.context = make_context(config.train.moe_backend)
        ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
        parts = build_chunks(config, vocab_size, self.context, self.device)
        self.models = [get_attr_wrapped_model(part, "decoder", return_model_obj=True) for part in parts]
        settings = get_model_config(parts[0])
        copied = (
            [weight for model in self.models for weight in share_embedding(model)] if config.model.mtp.layers else []
        )
        self._chunks = [
            wrap_with_ddp(settings, ddp, part, disable_bucketing=number > 0) for number, part in enumerate(parts)
        ]
        self.layers = [layer for model in self.models for layer in moe_layers(model)]
        for weight in (weight for layer in self.layers for weight in layer.experts.parameters()):
            # Possible because gradients are not reduced while others are computed.
            weight.adds_to_main_grad = True  # type: ignore[attr-defined]
        self.optimizer = make_optimizer(config, self._chunks)
        settings.finalize_model_grads_func = functools.partial(finalize_gradients, copied)
        settings.grad_scale_func = self.optimizer.scale_loss
        groups = (group for chunk in self._chunks for group in parameter_groups(chunk, config) if group["muon"])
        by_muon = frozenset(id(parameter) for group in groups for parameter in group["params"])
        muon.connect(config, self.models, self.optimizer, by_muon)
        self.state = OptimizerState(self.optimizer, by_muon)
        for model in self.models:  # reduces the counts of all its layers, overlapped with computation
            model.decoder.register_forward_hook(lambda *_: self.context.start_counts())
        # The core attention only: its projections have collectives under tensor parallelism.
        self.local_modules: Sequence[nn.Module] = [
            layer.self_attention.core_attention for m in self.models for layer in m.decoder.layers
        ]
        self._vocab_size = vocab_size
        self._context_rank = parallel_state.get_context_parallel_rank()
        named = ((w.name, w.parameter) for model in self.models for w in weights(model, config.model))
        self.moe = MoERuntime(config, self.layers, self.context, self.state, named, self.device)
        self._batches: Sequence[Batch] = ()
        self._total_tokens: Tensor | None = None
        self.step = self.updates = 0  # ``updates`` excludes skipped steps
        self._local_loss = torch.zeros((), device=self.device)
        self._losses_ahead: list[Tensor] = []
        self._grad_norm = 0.0

    def compute_gradients(
        self, batches: Sequence[Batch], record: bool, trace: RoutingTrace | None = None,
        replay: RoutingReplay | None = None,
    ) -> Gradients:  # fmt: skip
        self.step += 1
        self._set_mode(training=True)
        depths = self.config.model.mtp.layers
        own = [self._on_this_cp_rank(batch.looking_ahead(depths)) for batch in batches]
        # One micro-batch per rank, which is certain to fit in memory.
        self.moe.calibrate(lambda: self._run(own[:1], forward_only=True))
        self._batches = own
        self._total_tokens = tokens_of_pass(own, self.config.data, self.device)
        # Tensor-parallel ranks hold different tokens; Megatron sums the gradients of replicated parameters over them.
        loss_scale = 1.0 / (len(batches) * self.config.parallel.tensor)
        self._losses_ahead.clear()
        with self.moe.step(self.step, loss_scale, record, trace, replay):
            losses = self._accumulate(own)
        self.optimizer.prepare_grads()
        self._grad_norm = float(self.optimizer.get_grad_norm())
        none = torch.zeros((), device=self.device)
        means = [torch.stack(seen).mean() if seen else none for seen in (losses, self._losses_ahead)]
        self._local_loss = means[0]
        sums = torch.stack(means).double() / self._ranks_with_loss
        dist.all_reduce(sums)
        lm_loss, mtp_loss = sums.tolist()
        return Gradients(lm_loss, self._grad_norm, mtp_loss)

    def _accumulate(self, batches: Sequence[Batch]) -> list[Tensor]:
        """Computes and reduces the gradients of ``batches``; returns the losses of :meth:`_run`."""
        for chunk in self._chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        return self._run(batches, forward_only=False, total_tokens=self._total_tokens)

    def update(self, lr: float) -> list[AdaptationEvent]:
        clip_gradients(self.optimizer, self.config.optimizer.clip_grad, self._grad_norm)
        set_learning_rate(self.optimizer, lr)
        self.optimizer.step_with_ready_grads()
        self.updates += 1
        return self.moe.apply_step(self.step)

    def skip(self) -> list[AdaptationEvent]:
        return self.moe.skip_step(self.step)  # gradients are cleared before the next step

    def describe_nonfinite(self) -> str:
        return self.moe.describe_nonfinite(self._recompute_latest, self.step, self._local_loss, self._grad_norm)

    def _recompute_latest(self) -> None:
        """Repeats the latest step's passes without statistics; the next step clears the gradients."""
        with self.moe.recompute():
            self._accumulate(self._batches)

    def _set_mode(self, training: bool) -> None:
        for chunk in self._chunks:
            chunk.train(training)

    def _run(
        self, batches: Sequence[Batch], forward_only: bool, logits: bool = False, total_tokens: Tensor | None = None
    ) -> list[Tensor]:
        """Runs Megatron's schedule; returns the loss or logits of each batch, [] except on the last pipeline stage.

        ``batches`` are those of this context-parallel rank (:meth:`_on_this_cp_rank`). Losses are divided by
        ``total_tokens``, or by the number of labels that count.
        The interleaved schedule needs a multiple of the stages: evaluation pads with the last batch, then discards it.
        """
        interleaved = len(self._chunks) > 1
        fill = -len(batches) % self.config.parallel.pipeline if interleaved else 0
        filled = [*batches, *[batches[-1]] * fill]
        iterators = [iter(enumerate(filled)) for _ in self._chunks]

        def forward(batches: Iterator[tuple[int, Batch]], chunk: Any) -> tuple[Tensor, Callable[..., Any]]:
            number, batch = next(batches)
            length = batch.tokens_BS.shape[1] * self.config.parallel.context
            documents = Documents(batch.start_BS, length, self.device)
            model = get_attr_wrapped_model(chunk, "decoder", return_model_obj=True)
            if not self.config.model.latent.enabled:
                model.rotary_pos_emb.documents = documents
            if model.prediction is not None:
                model.prediction.batches = batch.ahead
                model.prediction.total_tokens = total_tokens
            labels = None if logits else batch.labels_BS
            with self.moe.micro_batch(number):
                output = chunk(batch.tokens_BS, None, documents, labels=labels)
            if model.prediction is not None and batch.ahead:
                self._losses_ahead.append(model.prediction.loss)
            return output, self._logits if logits else functools.partial(self._loss, batch.labels_BS, total_tokens)

        rows, length = batches[0].tokens_BS.shape
        made = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iterators if interleaved else iterators[0],
            model=self._chunks,
            num_microbatches=len(filled),
            seq_length=length * self.config.parallel.context,  # of the whole sequences
            micro_batch_size=rows,
            forward_only=forward_only,
            collect_non_loss_data=logits,
        )
        return made[: len(batches)]

    def _loss(self, labels_BS: Tensor, total_tokens: Tensor | None, loss_BS: Tensor) -> tuple[Tensor, Tensor]:
        """The loss to differentiate, which Megatron multiplies by the context-parallel size, and the loss to report."""
        counted_BS = counts_BS(labels_BS)
        total = counted_BS.sum().clamp(min=1) if total_tokens is None else total_tokens[0]
        loss = (loss_BS.float() * counted_BS).sum() / total
        return loss / self.config.parallel.context, loss.detach()

    def _logits(self, logits_BSV: Tensor, non_loss_data: bool = True) -> Tensor:
        return gather_from_tensor_model_parallel_region(logits_BSV)

    def _on_this_cp_rank(self, batch: Batch) -> Batch:
        """Moves a batch to the device, reduced to the positions of this context-parallel rank."""
        batch = batch.to(self.device)
        ranks = self.config.parallel.context
        if ranks == 1:
            return batch
        return batch.at(context_positions(batch.tokens_BS.shape[1], ranks, self._context_rank).to(self.device))

    def positions(self, length: int) -> Tensor:
        parallel = self.config.parallel
        held = context_positions(length, parallel.context, self._context_rank)
        return held.chunk(parallel.tensor)[parallel_state.get_tensor_model_parallel_rank()]  # sequence parallelism

    def report(self) -> StepReport:
        return self.moe.report()

    @property
    def _ranks_with_loss(self) -> int:
        """Number of ranks in the last pipeline stage, which have a loss."""
        return self.world_size // self.config.parallel.pipeline

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch], texts: Sequence[int], num_texts: int) -> list[float]:
        self._set_mode(training=False)
        losses = TextLosses(num_texts, self.device)
        own = [self._on_this_cp_rank(batch) for batch in batches]
        for number, mean in enumerate(self._run(own, forward_only=True)):  # none before the last stage
            losses.add(texts[number], mean, own[number].labels_BS)
        return losses.means()

    @torch.no_grad()
    def logits(self, tokens_BS: Tensor) -> Tensor:
        self._set_mode(training=False)
        parallel = self.config.parallel
        rows, length = tokens_BS.shape
        padded_BS = F.pad(tokens_BS, (0, -length % parallel.sequence_parts))  # causal: padding changes no logits
        made = self._run([self._on_this_cp_rank(Batch(padded_BS, padded_BS))], forward_only=True, logits=True)
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
        return checkpoint.snapshot(directory, self.models, self.optimizer, self.updates)

    def load(self, directory: Path) -> None:
        self.set_step(checkpoint.load(directory, self.models, self.optimizer))
        for chunk in self._chunks:  # gathers the parameters, of which each data-parallel rank has restored its shard
            chunk.start_param_sync(force_sync=True)

    def set_step(self, step: int) -> None:
        """Sets the counts of steps and of optimizer updates to ``step``."""
        self.step = step
        self.updates = step
        self.state.set_step(step)
