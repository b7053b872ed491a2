"""What every engine does for the MoE layers around an optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dynmoe.config import Config
from dynmoe.engines.nonfinite import GradientWatch, describe_nonfinite
from dynmoe.moe import MoEContext, MoELayer
from dynmoe.moe.adaptation import AdaptationEvent, ParameterRenewal
from dynmoe.moe.statistics import LayerStepStats, vector_size
from dynmoe.moe.trace import RoutingTrace
from dynmoe.moe.updates import RouterUpdates
from dynmoe.routing.control_statistics import ControlStatisticsSpec
from dynmoe.train.engine import StepReport


class MoERuntime:
    """Calibrates, brackets the passes of a step, acts after it, and reports it.

    An engine runs the passes within :meth:`step`, each within :meth:`micro_batch`, and then calls :meth:`apply_step` or
    :meth:`skip_step`. The layers are drained once, when the passes are done.

    Args:
        config: of the run.
        layers: that this rank holds, in order.
        context: of the layers.
        renewal: puts fresh weights in place of an expert's.
        parameters: of this rank, with their names in the plain model.
        device: of the model; a pipeline stage may hold no layer that would tell.
    """

    def __init__(
        self,
        config: Config,
        layers: Sequence[MoELayer],
        context: MoEContext,
        renewal: ParameterRenewal,
        parameters: Iterable[tuple[str, nn.Parameter]],
        device: torch.device,
    ) -> None:
        self.context = context
        self._model = config.model
        self._layers = layers
        self._device = device
        self._updates = RouterUpdates(config, layers, context.groups, renewal, device)
        self._watch = GradientWatch(parameters, layers)
        self._stats: list[LayerStepStats] = []
        self._routed_rows = [torch.zeros((), dtype=torch.int64, device=device) for _ in layers]
        self._sent_bytes = 0
        self._recorded = False
        self._control: ControlStatisticsSpec | None = None

    @torch.no_grad()
    def calibrate(self, run_pass: Callable[[], object]) -> None:
        """Lets threshold routers set their thresholds in a pass, each from what the layers before it give.

        Does nothing where none has to. ``run_pass`` runs one micro-batch on each rank, forward only; collective.
        """
        if self._updates.need_calibration:
            with self.context.running(calibrating=True):
                run_pass()

    @contextmanager
    def step(
        self, number: int, loss_scale: float, record: bool = False, trace: RoutingTrace | None = None
    ) -> Iterator[None]:
        """Around the passes of optimizer step ``number`` (from 1 on).

        Args:
            number: of the step.
            loss_scale: see :class:`dynmoe.moe.context.StepState`.
            record: collect statistics.
            trace: collects the routes; None for no trace.
        """
        self._control = self._updates.wanted(number)
        self._recorded = record
        with self.context.running(
            loss_scale=loss_scale, recording=record, trace=trace, control=self._control,
            target_experts=self._updates.target_experts(number),
        ):  # fmt: skip
            yield
        self._stats = [layer.drain() for layer in self._layers]
        self._routed_rows = [rows + own.routed_rows for rows, own in zip(self._routed_rows, self._stats, strict=True)]
        self._sent_bytes += sum(own.sent_bytes for own in self._stats)

    def micro_batch(self, number: int) -> AbstractContextManager[None]:
        """Around the forward pass of micro-batch ``number`` of a step."""
        return self.context.running(micro_batch=number)

    def repetition(self, number: int = 0) -> AbstractContextManager[None]:
        """Around a pass that repeats that of micro-batch ``number``: nothing is counted."""
        return self.context.running(micro_batch=number, recomputing=True)

    def apply_step(self, number: int) -> list[AdaptationEvent]:
        """After the optimizer's update: moves budgets, and removes and adds experts; collective."""
        return self._updates.apply(self._stats, self._control, number)

    def skip_step(self, number: int) -> list[AdaptationEvent]:
        """In place of :meth:`apply_step` where the update was skipped; collective."""
        return self._updates.skip(self._control, number)

    def describe_nonfinite(self, repeat: Callable[[], None], number: int, loss: Tensor, grad_norm: float) -> str:
        """What of step ``number`` is not finite: see :func:`dynmoe.engines.nonfinite.describe_nonfinite`."""
        overflowed = [layer.layer for layer, own in zip(self._layers, self._stats, strict=True) if own.overflowed]
        scores = [layer.layer for layer, own in zip(self._layers, self._stats, strict=True) if not own.finite]
        finite = bool(torch.isfinite(loss))
        return describe_nonfinite(self._model, overflowed, scores, self._watch, repeat, number, finite, grad_norm)

    def report(self) -> StepReport:
        """Reduces the figures since the last report over all ranks, in one collective."""
        held = {layer.layer: number for number, layer in enumerate(self._layers)}
        recorded = self._recorded
        self._recorded = False
        nothing = torch.zeros((), dtype=torch.float64, device=self._device)
        scalars = [torch.full_like(nothing, self._sent_bytes)]
        vectors = []
        sizes = []
        for index in self._model.moe_layers:
            number = held.get(index)
            scalars.append(nothing if number is None else self._routed_rows[number].double())
            size = vector_size(self._model, index) if recorded else 0
            known = recorded and number is not None
            vectors.append(self._stats[number].statistics() if known else nothing.expand(size))  # type: ignore[index]
            sizes.append(size)
        packed = torch.cat([torch.stack(scalars), *vectors])
        dist.all_reduce(packed)
        packed = packed.cpu()  # the one wait for the device
        self._sent_bytes = 0
        self._routed_rows = [torch.zeros_like(rows) for rows in self._routed_rows]
        counts = packed[: len(scalars)].tolist()
        parts = packed[len(scalars) :].split(sizes)
        return StepReport(
            routed_rows={index: int(count) for index, count in zip(self._model.moe_layers, counts[1:], strict=True)},
            sent_bytes=int(counts[0]),
            statistics=dict(zip(self._model.moe_layers, parts, strict=True)) if recorded else {},
        )
