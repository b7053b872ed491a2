"""DynMoE's released adaptation, against values computed by its code; Dynamic_MoE's model is in tests/hf."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from dynmoe.config import load_config
from dynmoe.moe import MoEContext, MoELayer, StepState
from dynmoe.moe.adaptation import Adaptation
from dynmoe.routing.update_statistics import UpdateStatisticsSpec, unpack_update_statistics
from tests.routing.test_golden import TOP_ANY, close

ADAPTIVE = sorted({name.split(".")[0] for name in TOP_ANY if name.startswith("adaptive")})

SPEC = UpdateStatisticsSpec(unclaimed=True)


class PlainRenewal:
    """Parameters without an optimizer."""

    def whole(self, module):
        return nullcontext()

    @torch.no_grad()
    def reset_slice(self, parameter, index, fresh):
        parameter[index] = fresh


@pytest.mark.parametrize("case", ADAPTIVE)
def test_one_released_window_and_update(case):
    def golden(name):
        return TOP_ANY[f"{case}.{name}"].clone()

    passes_x = golden("x")
    width, experts = golden("sim_before").shape
    config = load_config(None, [
        f"model.hidden={width}", "model.heads=1", "model.kv_heads=1", f"model.moe.experts={experts}",
        "model.moe.expert_hidden=8", "model.router.kind=top_any", "model.router.variant=released",
        "adaptation.interval=1", "adaptation.policy=released",
    ])  # fmt: skip
    layer = MoELayer(config.model, 0, 0, MoEContext(step=StepState(update_statistics=SPEC)))
    router = layer.router
    with torch.no_grad():
        router.prototypes_DE.copy_(golden("sim_before"))
        router.thresholds_E.copy_(golden("thr_before"))
        router.active_E.copy_(golden("mask_before").bool())
    for x_TD in passes_x:
        layer(x_TD)
    statistics = unpack_update_statistics(layer.drain().update_sums, experts, SPEC)
    assert torch.equal(statistics.selected_E, golden("routing_records").double())
    close(statistics.unclaimed_D.float(), golden("unrouted_sum"))
    Adaptation(config.adaptation, PlainRenewal()).update([layer], [statistics], step=1)
    assert torch.equal(router.active_E, golden("mask_after").bool())
    assert torch.equal(router.thresholds_E, golden("thr_after"))
    kept = (golden("sim_before") == golden("sim_after")).all(dim=0)
    assert torch.equal(router.prototypes_DE[:, kept], golden("sim_after")[:, kept])
    close(router.prototypes_DE.detach(), golden("sim_after"))
