"""Which experts a token takes, as pure functions of tensors and numbers.

Shape suffixes, in all of dynmoe: the name of a tensor ends in its dimensions, one letter each. T tokens, D model
dimension, E experts, K experts of one token (0 to E), N routed rows (the sum of K over tokens), M routes sent, received
or dropped, F expert width, H = 2F (rows of the fused gate-and-up projection), V vocabulary, B sequences, S positions,
P the positions so far (in a cache) or of one rank, R ranks, L experts of one rank, X real and null experts, C counters
(bins of a histogram, columns of a table). A digit is a literal size; 1 is a dimension kept for broadcasting. In
attention H is query heads, K key-value heads and d the width of a head. A file that uses other letters defines them at
its top.
"""

from dynmoe.routing import losses
from dynmoe.routing.capacity import apply_capacity, expert_capacity, limit_routes
from dynmoe.routing.expert_threshold import expert_threshold
from dynmoe.routing.null_experts import null_experts
from dynmoe.routing.plan import AsyncCounts, RoutingCounts, RoutingPlan
from dynmoe.routing.quantile import quantile_choice
from dynmoe.routing.relu import relu
from dynmoe.routing.sigmoid import sigmoid_cutoff
from dynmoe.routing.top_any import top_any
from dynmoe.routing.top_k import top_k
from dynmoe.routing.top_p import top_p

__all__ = [
    "AsyncCounts", "RoutingCounts", "RoutingPlan", "apply_capacity", "expert_capacity",
    "expert_threshold", "limit_routes", "losses", "null_experts", "quantile_choice", "relu",
    "sigmoid_cutoff", "top_any", "top_k", "top_p",
]  # fmt: skip
