"""SeqTopK (arXiv 2511.06494): the best (token, expert) pairs of each sequence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Optional

from dynmoe.routers.base import RouterState, auxiliary, register
from dynmoe.routers.losses import z_term
from dynmoe.routers.parts import BalancedRouter
from dynmoe.routers.pooled import PooledRouter

if TYPE_CHECKING:
    from torch import Tensor

    from dynmoe.routing.plan import RoutingPlan
    from dynmoe.routing.scope import TokenScope


@register("seq_top_k")
class SeqTopK(PooledRouter, BalancedRouter):
    """Selects the S * K most probable pairs of a sequence of S tokens; K, the budget, may be fractional.

    The gates are the probabilities. The paper limits a token to 1 to K + 2 experts: ``min_experts`` is 1 here too, the
    maximum is up to ``max_experts``. For generation, the paper caches all earlier scores and takes the m * K best of
    the first m tokens, of which only those of the latest token are still free. A cut-off needs no cache and holds K.
    """

    VARIANTS: ClassVar[dict[str, dict[str, Any]]] = {"paper": {"balance_loss": 1e-2, "balance_per_route": True}}
    BALANCES_SEQUENCES: ClassVar[bool] = True
    SELECTS_AMONG: ClassVar[str] = "sequence"

    z_loss: Optional[float] = auxiliary(z_term, "the router z-loss")

    def strength_TE(self, logits_TE: Tensor) -> Tensor:
        from dynmoe.routing.pooled import odds_of_uniform

        return odds_of_uniform(logits_TE.softmax(dim=1))

    def best_TE(self, values_TE: Tensor, experts_per_token: float, scope: TokenScope) -> Tensor:
        from dynmoe.routing.pooled import best_of_sequences

        return best_of_sequences(values_TE, experts_per_token, scope)

    def route(self, state: RouterState, x_TD: Tensor) -> RoutingPlan:
        from dynmoe.routing.selection import softmax_plan

        logits_TE = self.logits_TE(state, x_TD)
        map_TE = self.chosen_TE(state, logits_TE)
        return softmax_plan(logits_TE, logits_TE.softmax(dim=1), map_TE, **self.arguments("renormalize"))
