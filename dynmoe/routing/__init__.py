"""Ground floor: which experts a token takes, as pure functions of tensors and numbers.

Shape letters, here and in every file above: T tokens, D model dimension, E experts, K experts of one token,
N routed rows (the sum of K over tokens), F expert width.
"""

from dynmoe.routing import control, losses
from dynmoe.routing.capacity import apply_capacity, apply_ceiling, expert_capacity
from dynmoe.routing.expert_threshold import expert_threshold
from dynmoe.routing.losses import released_top_any_loss
from dynmoe.routing.null_experts import null_experts
from dynmoe.routing.plan import LateCounts, RoutingCounts, RoutingPlan
from dynmoe.routing.relu import relu
from dynmoe.routing.sigmoid import sigmoid_cutoff
from dynmoe.routing.top_any import top_any
from dynmoe.routing.top_k import top_k
from dynmoe.routing.top_p import top_p

__all__ = [
    "LateCounts",
    "RoutingCounts",
    "RoutingPlan",
    "apply_capacity",
    "apply_ceiling",
    "control",
    "expert_capacity",
    "expert_threshold",
    "losses",
    "null_experts",
    "released_top_any_loss",
    "relu",
    "sigmoid_cutoff",
    "top_any",
    "top_k",
    "top_p",
]
