"""What runs on the ranks of a pool for the tests of engines: a short training on made-up tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dynmoe.config import Config, load_config
from dynmoe.data.batches import Batch
from dynmoe.engines.deepspeed import DeepSpeedEngine
from dynmoe.errors import UserError
from dynmoe.moe.routers import Router

VOCAB, LENGTH, GLOBAL_BATCH = 64, 24, 8


def config_for(*overrides: str) -> Config:
    base = [
        "model.hidden=32", "model.heads=2", "model.kv_heads=1", "model.layers=2", "model.moe.experts=4",
        "model.moe.expert_hidden=32", "model.init_std=0.1", f"data.sequence_length={LENGTH}",
        f"train.global_batch={GLOBAL_BATCH}", "optimizer.lr=3e-3",
    ]  # fmt: skip
    return load_config(None, [*base, *overrides])


def batch_of_step(step: int) -> torch.Tensor:
    """The global batch [B, S + 1] of a step: short cycles with noise, so that there is something to learn."""
    generator = torch.Generator().manual_seed(step)
    start = torch.randint(VOCAB, (GLOBAL_BATCH, 1), generator=generator)
    tokens = (start + 3 * torch.arange(LENGTH + 1)) % VOCAB
    noise = torch.randint(VOCAB, tokens.shape, generator=generator)
    return torch.where(torch.rand(tokens.shape, generator=generator) < 0.2, noise, tokens)


def micro_batches(engine: DeepSpeedEngine, step: int) -> list[Batch]:
    tokens, size = batch_of_step(step), engine.config.train.micro_batch
    starts = range(engine.data_rank * size, GLOBAL_BATCH, engine.data_size * size)
    return [Batch(tokens[s : s + size, :-1], tokens[s : s + size, 1:]) for s in starts]


def train(overrides: list[str], first: int, last: int, load: str = "", save: str = "") -> dict[str, Any]:
    """Steps ``first`` to ``last`` - 1: losses, gradient norms, and the routing maps of every step as bytes."""
    config = config_for(*overrides)
    config.check_world(dist.get_world_size())
    engine = DeepSpeedEngine(config, VOCAB)
    if load:
        engine.load(Path(load))
    maps: list[torch.Tensor] = []
    for module in engine.module.modules():
        if isinstance(module, Router):
            module.register_forward_hook(lambda module, inputs, plan: maps.append(plan.routing_map_TE.clone()))
    losses, norms, rows, statistics, events = [], [], [], [], []
    for step in range(first, last):
        events += engine.train_step(micro_batches(engine, step), config.optimizer.lr, record=True)
        report = engine.report()
        losses.append(report.lm_loss)
        norms.append(report.grad_norm)
        rows.append(report.routed_rows)
        statistics.append({layer: vector.tolist() for layer, vector in report.statistics.items()})
    if save:
        Path(save).mkdir(parents=True, exist_ok=True)
        dist.barrier()
        engine.save(Path(save))
        dist.barrier()
    state = _whole_state(engine)
    return {
        "losses": losses, "norms": norms, "maps": maps, "rows": rows, "statistics": statistics, "events": events,
        "state": state,
    }  # fmt: skip


def _whole_state(engine: DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """fp32 masters and moments of the parameters that this rank holds, the parameters themselves, and all buffers."""
    state = {f"buffer {name}": buffer.clone() for name, buffer in engine.module.named_buffers()}
    for name, parameter in engine.module.named_parameters():
        state[name] = parameter.detach().clone()
        state |= {f"{name}|{part}": value.clone() for part, value in engine._state.get(parameter).items()}
    return state


def train_into_nan(overrides: list[str], layer: int, rank: int) -> tuple[str, bool]:
    """Two sound steps and one in which the router of ``layer`` sees NaN on ``rank``; what is said, and whether the
    state is as it was before that step."""
    config = config_for(*overrides)
    engine = DeepSpeedEngine(config, VOCAB)
    for step in range(2):
        engine.train_step(micro_batches(engine, step), config.optimizer.lr, record=False)
    before = _whole_state(engine)
    if dist.get_rank() == rank:
        router = engine.module.moe_layers[layer].router
        router.register_forward_pre_hook(lambda module, inputs: (inputs[0] * float("nan"),))
    try:
        engine.train_step(micro_batches(engine, 2), config.optimizer.lr, record=False)
    except UserError as error:
        after = _whole_state(engine)
        return str(error), all(torch.equal(value, after[name]) for name, value in before.items())
    return "nothing was said", False
