"""The budget's loop on routers whose inputs share a direction: cosines then hardly differ from token to token."""

from __future__ import annotations

import pytest
import torch

from dynmoe.config import load_config
from dynmoe.moe import MoEContext
from dynmoe.moe.budget import Budget
from dynmoe.moe.router import Router
from dynmoe.routing.update_statistics import (
    UpdateStatisticsSpec,
    pack_update_statistics,
    unpack_update_statistics,
)

EXPERTS = 16
TOKENS = 512


def experts_per_token(kind: list[str], common: float, steps: int, hidden: int) -> tuple[list[float], torch.Tensor]:
    """K by step, and the load of each expert in the last; inputs have ``common`` of their energy in one direction."""
    config = load_config(None, [
        f"model.hidden={hidden}", f"model.moe.experts={EXPERTS}", "budget.experts_per_token=2", *kind,
    ])  # fmt: skip
    router = Router(config.model, EXPERTS, 0, "router", MoEContext()).train()
    budget = Budget(config)
    wanted = UpdateStatisticsSpec(deviation=router.spec.NEEDS_DEVIATION)
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(hidden, generator=generator)
    with torch.no_grad():
        if router.spec.kind == "top_any":
            router.prototypes_DE[:, 3] += 0.05 * direction  # the best expert of many tokens
    seen = []
    for step in range(1, steps + 1):
        noise = torch.randn(TOKENS, hidden, generator=generator)
        x_TD = common**0.5 * direction + (1 - common) ** 0.5 * noise
        plan = router(x_TD)
        compared_TE = router.spec.compared_TE(router, plan).detach() if wanted.deviation else None
        packed = pack_update_statistics(plan, x_TD, compared_TE, wanted)
        statistics = unpack_update_statistics(packed, EXPERTS, wanted)
        budget.update([router], [statistics], step)
        seen.append(statistics.experts_per_token.item())
    return seen, plan.tokens_per_expert_E


TOP_ANY = ["model.router.kind=top_any", "model.router.variant=improved"]


@pytest.mark.parametrize("common", [0.0, 0.5, 0.9])
@pytest.mark.parametrize(
    ("kind", "hidden"),
    [
        (["model.router.kind=top_p", "budget.method=pi"], 64),
        ([*TOP_ANY, "budget.method=pi"], 64),
        ([*TOP_ANY, "budget.method=loss_free"], 64),
        # The scores of most tokens and one expert are 1 here.
        ([*TOP_ANY, "budget.method=loss_free", "model.router.min_experts=0"], 1024),
        (["model.router.kind=sigmoid", "budget.method=loss_free"], 64),
    ],
    ids=lambda given: " ".join(part.split("=")[1] for part in given) if isinstance(given, list) else str(given),
)
def test_experts_per_token_stay_near_the_target_in_every_step(kind, hidden, common):
    observed, load = experts_per_token(kind, common, 200, hidden)
    late = observed[100:]
    assert sum(late) / len(late) == pytest.approx(2.0, rel=0.01)
    assert min(late) > 1.7
    assert max(late) < 2.3
    if "budget.method=loss_free" in kind:
        assert load.max() < 1.6 * load.float().mean()
