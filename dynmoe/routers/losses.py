"""Auxiliary losses that several routers share; ``routing/losses.py`` has their formulas."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from dynmoe.routers.base import LossInputs

if TYPE_CHECKING:
    from torch import Tensor

    from dynmoe.routing.plan import RoutingPlan


def balance_term(inputs: LossInputs) -> Tensor:
    """Load balance over batches, or within each sequence."""
    from dynmoe.routing.losses import load_balance, sequence_balance

    per_route = inputs.spec.balance_per_route
    plan = _with_shares(inputs)
    if inputs.spec.balance_scope == "sequence":
        return sequence_balance(plan, *inputs.sequence_counts, per_route=per_route)
    return load_balance(plan, inputs.counts, per_route=per_route)


def _with_shares(inputs: LossInputs) -> RoutingPlan:
    """The plan; the sigmoids of a ``score_function`` are divided by their sum (DeepSeek-V3, eq. 19)."""
    from dynmoe.routing.selection import sum_to_one

    plan = inputs.plan
    if getattr(inputs.spec, "score_function", "softmax") == "softmax":
        return plan
    return dataclasses.replace(plan, scores_TE=sum_to_one(plan.scores_TE))


def entropy_term(inputs: LossInputs) -> Tensor:
    """Mean entropy of the scores of a token."""
    from dynmoe.routing.losses import entropy

    return entropy(_with_shares(inputs))


def z_term(inputs: LossInputs) -> Tensor:
    """Mean squared log-sum-exp of the logits."""
    from dynmoe.routing.losses import z_loss

    return z_loss(inputs.plan)
