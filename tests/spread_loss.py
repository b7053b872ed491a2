"""An auxiliary loss of our own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynmoe.routers.base import LossInputs

if TYPE_CHECKING:
    from torch import Tensor


def spread_term(inputs: LossInputs) -> Tensor:
    """Variance of the scores of a token."""
    return inputs.plan.scores_TE.var(dim=1).mean()
