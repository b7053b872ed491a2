"""Auxiliary losses that several routers share; ``routing/losses.py`` has their formulas."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynmoe.routers.base import LossInputs

if TYPE_CHECKING:
    from torch import Tensor


def balance_term(inputs: LossInputs) -> Tensor:
    """Load balance over batches, or within each sequence."""
    from dynmoe.routing.losses import load_balance, sequence_balance

    per_route = inputs.spec.balance_per_route
    if inputs.spec.balance_scope == "sequence":
        return sequence_balance(inputs.plan, *inputs.sequence_counts, per_route=per_route)
    return load_balance(inputs.plan, inputs.counts, per_route=per_route)


def entropy_term(inputs: LossInputs) -> Tensor:
    """Mean entropy of the scores of a token."""
    from dynmoe.routing.losses import entropy

    return entropy(inputs.plan)


def z_term(inputs: LossInputs) -> Tensor:
    """Mean squared log-sum-exp of the logits."""
    from dynmoe.routing.losses import z_loss

    return z_loss(inputs.plan)
