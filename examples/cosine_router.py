"""A router of our own for vision_domains.py: the cosine router of GMoE (arXiv 2206.04046).

Importing this file makes it available as model.router.kind=cosine_top_k.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

from dynmoe.fields import option
from dynmoe.routers import TopK
from dynmoe.routers.base import RouterState, TensorSpec, register

if TYPE_CHECKING:
    from torch import Tensor


@register("cosine_top_k")
class CosineTopK(TopK):
    """Selects the k best experts by the cosine of the projected token with each expert's embedding.

    The gates are the softmax of the cosines over a learned temperature, which starts at 0.5.
    """

    VARIANTS: ClassVar[dict[str, dict[str, Any]]] = {"paper": {"balance_loss": 1e-2}}

    width: int = option(8, "dimension of the projected token and of the embeddings", at_least=1)

    def parameters(self, hidden: int, num_experts: int) -> dict[str, TensorSpec]:
        return {
            "project_PD": TensorSpec((self.width, hidden), None, export="tensor"),
            "embeddings_PE": TensorSpec((self.width, num_experts), None, export="tensor"),
            "log_scale": TensorSpec((1,), math.log(2.0), export="tensor"),
        }

    def logits_TE(self, state: RouterState, x_TD: Tensor) -> Tensor:
        from dynmoe.routing.top_any import cosines

        logits_TE: Tensor = state.log_scale.exp() * cosines(state.linear(x_TD, state.project_PD), state.embeddings_PE)
        return logits_TE
