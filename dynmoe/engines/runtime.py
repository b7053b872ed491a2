"""The work that every engine does for the MoE layers around an optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dynmoe.config import Config
from dynmoe.engines.nonfinite import GradientWatch, describe_nonfinite
from dynmoe.moe import MoEContext, MoELayer
from dynmoe.moe.adaptation import AdaptationEvent, ParameterReset
from dynmoe.moe.replay import RoutingReplay
from dynmoe.moe.statistics import LayerStepStats, vector_size
from dynmoe.moe.trace import RoutingTrace
from dynmoe.moe.updates import RouterUpdates
from dynmoe.routing.update_statistics import UpdateStatisticsSpec
from dynmoe.train.engine import StepReport


class MoERuntime:
    """Calibrates thresholds, sets the state of each forward pass, updates routers and experts, and reports statistics.

    An engine runs the micro-batches of a step within :meth:`step`, each within :meth:`micro_batch`, and then calls
    :meth:`apply_step` or :meth:`skip_step`. The layers are drained at the end of :meth:`step`.

    Args:
        config: of the run.
        layers: MoE layers of this rank, in order.
        context: of the layers.
        optimizer_state: resets parameters of new experts.
        parameters: of this rank, with their names in the canonical model.
        device: of the model; needed because a pipeline stage may have no MoE layer.
    """

    def __init__(
        self, config: Config, layers: Sequence[MoELayer], context: MoEContext, optimizer_state: ParameterReset,
        parameters: Iterable[tuple[str, nn.Parameter]], device: torch.device,
    ) -> None:  # fmt: skip
        self.context = context
        context.aim(config.budget.experts_per_token)
        self._model = config.model
        self._layers = layers
        self._device = device
        self._updates = RouterUpdates(config, layers, context.groups, optimizer_state, device)
        self._watch = GradientWatch(parameters, layers)
        self._stats: list[LayerStepStats] = []
        self._routed_rows = [torch.zeros((), dtype=torch.int64, device=device) for _ in layers]
        self._sent_bytes = 0
        self._recorded = False
        self._update_spec: UpdateStatisticsSpec | None = None
        self._replay: RoutingReplay | None = None
        self._target: float | None = None

    @torch.no_grad()
    def calibrate(self, run_pass: Callable[[], object]) -> None:
        """Runs a forward pass in which threshold routers set their thresholds, if any router needs it.

        ``run_pass`` runs one micro-batch on each rank, forward only; collective.
        """
        if self._updates.need_calibration:
            target = self._updates.target_experts(1)
            with self.context.override(calibrating=True, target_experts=target):
                run_pass()

    @contextmanager
    def step(
        self, number: int, loss_scale: float, record: bool = False, trace: RoutingTrace | None = None,
        replay: RoutingReplay | None = None,
    ) -> Iterator[None]:  # fmt: skip
        """The context of all micro-batches of optimizer step ``number`` (from 1).

        Args:
            number: of the step.
            loss_scale: see :class:`dynmoe.moe.context.StepState`.
            record: collect statistics.
            trace: collects the routes; None for no trace.
            replay: forces the routes; None for the routers' own.
        """
        self._update_spec = self._updates.spec(number)
        self._recorded = record
        self._replay = replay
        self._target = self._updates.target_experts(number)
        with self.context.override(
            loss_scale=loss_scale, recording=record, trace=trace, update_statistics=self._update_spec,
            target_experts=self._target, replay=replay,
        ):  # fmt: skip
            yield
        self._stats = [layer.drain() for layer in self._layers]
        self._routed_rows = [rows + own.routed_rows for rows, own in zip(self._routed_rows, self._stats, strict=True)]
        self._sent_bytes += sum(own.sent_bytes for own in self._stats)

    def micro_batch(self, number: int) -> AbstractContextManager[None]:
        """The context of the forward pass of micro-batch ``number`` of a step."""
        return self.context.override(micro_batch=number)

    def recompute(self, number: int = 0) -> AbstractContextManager[None]:
        """The context of a forward pass that repeats that of micro-batch ``number``; nothing is counted."""
        return self.context.override(
            micro_batch=number, recomputing=True, replay=self._replay, target_experts=self._target
        )

    def apply_step(self, number: int) -> list[AdaptationEvent]:
        """Updates budgets and the set of experts after the optimizer's update; collective."""
        return self._updates.apply(self._stats, self._update_spec, number)

    def skip_step(self, number: int) -> list[AdaptationEvent]:
        """Replaces :meth:`apply_step` if the optimizer's update was skipped; collective."""
        return self._updates.skip(self._update_spec, number)

    def describe_nonfinite(self, repeat: Callable[[], None], number: int, loss: Tensor, grad_norm: float) -> str:
        """See :func:`dynmoe.engines.nonfinite.describe_nonfinite`."""
        overflowed = [layer.layer for layer, own in zip(self._layers, self._stats, strict=True) if own.overflowed]
        scores = [layer.layer for layer, own in zip(self._layers, self._stats, strict=True) if not own.finite]
        finite = bool(torch.isfinite(loss))
        return describe_nonfinite(self._model, overflowed, scores, self._watch, repeat, number, finite, grad_norm)

    def report(self) -> StepReport:
        """Sums the statistics since the last report over all ranks, in one all-reduce."""
        index_of = {layer.layer: index for index, layer in enumerate(self._layers)}
        recorded = self._recorded
        self._recorded = False
        zero = torch.zeros((), dtype=torch.float64, device=self._device)
        scalars = [torch.full_like(zero, self._sent_bytes)]
        vectors = []
        for layer in self._model.moe_layers:
            index = index_of.get(layer)
            scalars.append(zero if index is None else self._routed_rows[index].double())
            if recorded:
                size = vector_size(self._model, layer)
                vectors.append(zero.expand(size) if index is None else self._stats[index].statistics())
        packed = torch.cat([torch.stack(scalars), *vectors])
        dist.all_reduce(packed)
        packed = packed.cpu()  # the only wait for the device
        self._sent_bytes = 0
        self._routed_rows = [torch.zeros_like(rows) for rows in self._routed_rows]
        counts = packed[: len(scalars)].tolist()
        parts = packed[len(scalars) :].split([len(vector) for vector in vectors])
        return StepReport(
            routed_rows={layer: int(count) for layer, count in zip(self._model.moe_layers, counts[1:], strict=True)},
            sent_bytes=int(counts[0]),
            statistics=dict(zip(self._model.moe_layers, parts, strict=True)) if recorded else {},
        )
