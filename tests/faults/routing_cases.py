"""Scenarios of extreme routing on the ranks of a pool: all tokens on one expert, on no expert, or on all experts."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dynmoe.engines import make_engine
from dynmoe.moe import MoELayer
from dynmoe.routers import TopAny
from dynmoe.train.engine import take_step
from tests.engines.cases import VOCAB, config_for, micro_batches
from tests.moe.cases import run_layer

# Offsets of the scores of four experts, two on each of two ranks.
FAR = 30.0
PREFERENCES = {
    "an expert of the first rank": [FAR, -FAR, -FAR, -FAR],
    "an expert of the second rank": [-FAR, -FAR, -FAR, FAR],
    "the experts of one rank": [FAR, FAR, -FAR, -FAR],
    "nobody": [-FAR] * 4,
    "everybody": [FAR] * 4,
}


def steer(layer: MoELayer, preference: list[float]) -> None:
    """Shifts the scores of experts, which determines the selection of every token."""
    router = layer.router
    preference_E = torch.tensor(preference)
    if isinstance(router.spec, TopAny):
        router.offset_E.copy_(-preference_E)
        return
    linear = router.linear
    router.linear = lambda x_TD, weight_ED: linear(x_TD, weight_ED) + preference_E


class Collectives(TorchDispatchMode):
    """Records the names of all collectives of this process, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def train_steered(overrides: list[str], preference: list[float], steps: int = 3) -> dict[str, Any]:
    """Losses, gradient norms and routed rows of each step, and the collectives of all steps."""
    config = config_for(*overrides)
    engine = make_engine(config, VOCAB)
    for layer in engine.layers:
        steer(layer, preference)
    losses = []
    norms = []
    rows = []
    with Collectives() as collectives:
        for step in range(steps):
            batches = micro_batches(config, step, engine.data_rank, engine.data_size)
            gradients, _ = take_step(engine, batches, config.optimizer.lr)
            losses.append(gradients.lm_loss)
            norms.append(gradients.grad_norm)
            rows.append(engine.report().routed_rows)
    return {"losses": losses, "norms": norms, "rows": rows, "collectives": collectives.names}


def steered_pass(layer: MoELayer, preference: list[float], tokens: int) -> dict[str, torch.Tensor]:
    """Output and all gradients of a forward and backward pass of a layer with shifted scores."""
    steer(layer, preference)
    width = layer.experts.w_up_EHD.shape[2]
    x, upstream = torch.randn(2, tokens, width, generator=torch.Generator().manual_seed(1))
    return {"x_TD": x, "upstream": upstream, **run_layer(layer, x, upstream)}
