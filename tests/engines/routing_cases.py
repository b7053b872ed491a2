"""Training steps that record their complete routing, run on the ranks of a pool by tests of statistics and traces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.utils.checkpoint import set_checkpoint_early_stop

from dynmoe.engines import make_engine
from dynmoe.errors import UserError
from dynmoe.moe.trace import RoutingTrace
from dynmoe.train.engine import take_step
from dynmoe.train.metrics import histograms, moe_row
from dynmoe.train.replay import ReplaySource
from dynmoe.train.traces import write_trace
from tests.engines.cases import GLOBAL_BATCH, VOCAB, config_for, micro_batches, place


def keep_plans(engine: Any) -> dict[tuple[int, int], dict[str, Any]]:
    """Records the dispatcher's input by layer and micro-batch; a recomputed pass replaces the first."""
    kept: dict[tuple[int, int], dict[str, Any]] = {}
    for layer in engine.layers:
        dispatch = layer.dispatcher.dispatch

        def watched(x_TD, plan, max_rows=None, layer=layer, dispatch=dispatch):
            router = layer.router
            kept[layer.layer, engine.context.step.micro_batch] = {
                "routed": plan.routing_map_TE.tolist(),
                "selected": plan.selected_map_TE.tolist(),
                "scores": plan.scores_TE.tolist(),
                "gates": plan.gates_TE.tolist(),
                "logits": None if plan.logits_TE is None else plan.logits_TE.tolist(),
                "active": router.active_E.tolist(),
                "prototypes": router.prototypes_DE.tolist() if hasattr(router, "prototypes_DE") else None,
            }
            return dispatch(x_TD, plan, max_rows)

        layer.dispatcher.dispatch = watched
    return kept


def train_and_keep(overrides: list[str], steps: int, traces: str = "") -> dict[str, Any]:
    """Trains; returns metrics, histograms and this rank's plans of the last step; writes its trace to ``traces``."""
    config = config_for(*overrides)
    config.check_world(dist.get_world_size())
    engine = make_engine(config, VOCAB)
    plans = keep_plans(engine)
    for step in range(1, steps + 1):
        batches = micro_batches(config, step, engine.data_rank, engine.data_size)
        trace = RoutingTrace() if traces and step == steps else None
        plans.clear()
        # Recomputation usually stops once the last saved tensor is available; here it must run to the end.
        with set_checkpoint_early_stop(False):
            take_step(engine, batches, config.optimizer.lr, record=step == steps, trace=trace)
        report = engine.report()
    if trace is not None:
        positions = engine.positions(config.data.sequence_length)
        write_trace(Path(traces), steps, dist.get_rank(), trace, samples_of(engine), batches, positions)
    row = moe_row(report, config, steps)
    return {"row": row, "histograms": histograms(report, config, steps), "plans": plans, "place": place(engine)}


def samples_of(engine: Any) -> list[range]:
    """Sample numbers of the micro-batches of this rank, the same in every step."""
    size = engine.config.train.micro_batch
    return [range(s, s + size) for s in range(engine.data_rank * size, GLOBAL_BATCH, engine.data_size * size)]


def train_and_trace(overrides: list[str], steps: int, traces: str, replay: str = "") -> dict[str, Any]:
    """Trains and traces every step, with the experts of the traces ``replay`` if given.

    Returns the losses and gradient norms, this rank's plans of the last step, and the final control values.
    """
    config = config_for(*overrides, *([f"train.replay={replay}"] if replay else []))
    config.check_world(dist.get_world_size())
    engine = make_engine(config, VOCAB)
    source = ReplaySource(replay, Path(traces)) if replay else None
    positions = engine.positions(config.data.sequence_length)
    plans = keep_plans(engine)
    seen = []
    for step in range(1, steps + 1):
        batches = micro_batches(config, step, engine.data_rank, engine.data_size)
        samples = samples_of(engine)
        trace = RoutingTrace()
        forced = None if source is None else source.read(step, engine.layers, samples, batches, positions)
        plans.clear()
        with set_checkpoint_early_stop(False):
            gradients, _ = take_step(engine, batches, config.optimizer.lr, trace=trace, replay=forced)
        seen.append((gradients.lm_loss, gradients.grad_norm))
        write_trace(Path(traces), step, dist.get_rank(), trace, samples, batches, positions)
    control = [float(layer.router.control_value) for layer in engine.layers]
    return {"seen": seen, "plans": plans, "place": place(engine), "control": control}


def refused_replay(overrides: list[str], step: int, traces: str, replay: str) -> str:
    """The error with which this rank refuses to replay a step."""
    try:
        train_and_trace(overrides, step, traces, replay)
    except UserError as error:
        return str(error)
    return "no error was raised"
