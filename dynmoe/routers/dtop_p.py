"""DTop-p (arXiv 2512.13996): top-p of normalized logits, with a learned scale for each layer and one p for all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from dynmoe.routers.base import RouterState, TensorSpec, register
from dynmoe.routers.top_p import TopP

if TYPE_CHECKING:
    from torch import Tensor


@register("dtop_p")
class DTopP(TopP):
    """Top-p whose logits have a mean of 0 over experts and a deviation of ``scale``, which is learned.

    A layer with a larger scale has sharper probabilities and needs fewer experts to reach the common p, so layers share
    one budget (``budget.method=pi``, ``budget.scope=global``). ``budget.scope=layer`` is the paper's variant with one
    controller for each layer.

    Choices of ours: the scale starts at 1 and is not bounded, and the controller is that of top_p, whereas the paper's
    adds its terms to p itself, with an error relative to the number of experts.
    """

    VARIANTS: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {"renormalize": True, "balance_loss": 1e-4, "entropy_loss": 1e-3}
    }

    def parameters(self, hidden: int, num_experts: int) -> dict[str, TensorSpec]:
        return super().parameters(hidden, num_experts) | {"scale": TensorSpec((1,), 1.0, export="tensor")}

    def logits_TE(self, state: RouterState, x_TD: Tensor) -> Tensor:
        from dynmoe.routing.top_p import normalized_logits

        return normalized_logits(state.linear(x_TD, state.weight_ED), state.scale)
