"""Statistics of a routing plan, packed into one vector for one all-reduce.

Every entry is a sum over tokens, so vectors of micro-batches and ranks can be added. Ratios, quantiles and maxima are
computed from the sums after the all-reduce.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dynmoe.routing.plan import RoutingPlan

_SCALARS = ("tokens", "unselected_tokens", "all_dropped_tokens", "selected_routes", "entropy", "margin", "z")
QUANTILES = (5, 50, 95)


def packed_size(num_experts: int) -> int:
    """Size of the vector of :func:`pack`."""
    return len(_SCALARS) + (num_experts + 1) + num_experts


@torch.no_grad()
def pack(plan: RoutingPlan) -> Tensor:
    """Counts of one plan, fp64: scalars, histogram of experts per token [E + 1], load of experts [E]."""
    scores_TE = plan.scores_TE.detach()
    num_tokens, num_experts = scores_TE.shape
    experts_T = plan.experts_per_token_T
    selected_T = plan.selected_map_TE.sum(dim=1)
    share_TE = scores_TE / scores_TE.sum(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    best_T2 = scores_TE.topk(min(2, num_experts), dim=1).values  # [T, 1] with a single expert
    logits_TE = plan.logits_TE
    zero = torch.zeros((), device=scores_TE.device)
    scalars = [
        torch.full((), num_tokens, device=scores_TE.device),
        (selected_T == 0).sum(),
        ((selected_T > 0) & (experts_T == 0)).sum(),
        selected_T.sum(),
        -torch.special.xlogy(share_TE, share_TE).sum(dtype=torch.float64),
        (best_T2[:, 0] - best_T2[:, -1]).sum(dtype=torch.float64),
        zero if logits_TE is None else logits_TE.detach().logsumexp(dim=1).square().sum(dtype=torch.float64),
    ]
    # bincount would wait for the device.
    histogram_K = (experts_T[:, None] == torch.arange(num_experts + 1, device=scores_TE.device)).sum(dim=0)
    return torch.cat([torch.stack([value.double() for value in scalars]), histogram_K, plan.tokens_per_expert_E])


@dataclass(frozen=True)
class LayerCounts:
    """Named parts of the vector of :func:`pack`, summed over micro-batches and ranks."""

    packed: Tensor
    num_experts: int

    @property
    def histogram_K(self) -> Tensor:
        """Number of tokens that used 0, 1, ..., E experts, [E + 1]."""
        return self.packed[len(_SCALARS) : len(_SCALARS) + self.num_experts + 1]

    @property
    def load_E(self) -> Tensor:
        """Number of tokens that each expert computed."""
        return self.packed[len(_SCALARS) + self.num_experts + 1 :]

    def scalar(self, name: str) -> float:
        return self.packed[_SCALARS.index(name)].item()

    def quantile_of_experts(self, percent: int) -> int:
        """Smallest K such that at least ``percent`` % of the tokens use at most K experts; exact."""
        cumulative = self.histogram_K.cumsum(0)
        return int((cumulative * 100 < percent * cumulative[-1]).sum())


def summarize(counts: LayerCounts, active_experts: int, most_experts: int, expert_parallel: int) -> dict[str, float]:
    """Metrics of one layer, by their names in the metrics file.

    Args:
        counts: sums over all ranks and micro-batches of a step.
        active_experts: number of active experts.
        most_experts: maximum number of experts of a token.
        expert_parallel: number of ranks that hold the experts, in equal consecutive blocks.
    """
    tokens = counts.scalar("tokens")
    histogram_K = counts.histogram_K
    load_E = counts.load_E
    routes = load_E.sum().item()
    selected = counts.scalar("selected_routes")
    mean_load = routes / active_experts
    used = torch.arange(histogram_K.shape[0], dtype=histogram_K.dtype, device=histogram_K.device)[histogram_K > 0]
    # The variance is over active experts only: the others have no load.
    variance = (load_E.square().sum().item() - active_experts * mean_load**2) / active_experts
    rank_load = load_E.view(expert_parallel, -1).sum(dim=1)
    return {
        "experts_per_token_mean": routes / tokens,
        **{f"experts_per_token_p{q}": float(counts.quantile_of_experts(q)) for q in QUANTILES},
        "experts_per_token_max": used.max().item(),
        "selected_per_token_mean": selected / tokens,
        "tokens_without_expert_frac": counts.scalar("unselected_tokens") / tokens,
        "tokens_at_ceiling_frac": histogram_K[most_experts:].sum().item() / tokens,
        "active_experts": float(active_experts),
        "dead_experts": float(active_experts - int((load_E > 0).sum())),
        "load_max_over_mean": load_E.max().item() / mean_load if routes else 0.0,
        "load_cv": max(variance, 0.0) ** 0.5 / mean_load if routes else 0.0,
        "router_entropy": counts.scalar("entropy") / tokens,
        "top1_margin": counts.scalar("margin") / tokens,
        "dropped_routes_frac": (selected - routes) / selected if selected else 0.0,
        "tokens_all_dropped_frac": counts.scalar("all_dropped_tokens") / tokens,
        "ep_rank_load_max_over_mean": (rank_load.max() / rank_load.mean()).item() if routes else 0.0,
    }
