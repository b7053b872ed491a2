"""Router modules, one class for each kind: parameters, state between steps, and the call of the kind's function."""

from dynmoe.config import ModelConfig
from dynmoe.moe.context import MoEContext
from dynmoe.moe.routers.base import Router
from dynmoe.moe.routers.softmax import NullExpertRouter, TopKRouter, TopPRouter
from dynmoe.moe.routers.threshold import (
    ExpertThresholdRouter,
    HeldThresholdRouter,
    ReLURouter,
    SigmoidRouter,
    ThresholdRouter,
    TopAnyRouter,
)

# By the names of ``model.router.kind`` (dynmoe/config/routing.py).
ROUTERS: dict[str, type[Router]] = {
    "top_k": TopKRouter,
    "top_p": TopPRouter,
    "top_any": TopAnyRouter,
    "sigmoid": SigmoidRouter,
    "expert_threshold": ExpertThresholdRouter,
    "relu": ReLURouter,
    "null_experts": NullExpertRouter,
}


def make_router(model: ModelConfig, num_experts: int, seed: int, name: str, context: MoEContext) -> Router:
    """The router of the configured kind; arguments as in :class:`Router`."""
    return ROUTERS[model.router.kind](model, num_experts, seed, name, context)


__all__ = ["ROUTERS", "HeldThresholdRouter", "Router", "ThresholdRouter", "TopAnyRouter", "make_router"]
