"""What is counted of a routing plan, packed into one vector so that one reduction serves all of it.

Every entry is a sum over tokens (or over forward passes), so that micro-batches and ranks add up. Ratios, quantiles
and maxima are taken from the sums, after the reduction.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dynmoe.routing.plan import RoutingPlan

_SCALARS = ("tokens", "unselected_tokens", "all_dropped_tokens", "selected_routes", "entropy", "margin", "z")
QUANTILES = (5, 50, 95)


def packed_size(num_experts: int) -> int:
    """Entries of the vector that :func:`pack` makes."""
    return len(_SCALARS) + (num_experts + 1) + num_experts


@torch.no_grad()
def pack(plan: RoutingPlan) -> Tensor:
    """Counts of one plan, fp64: scalars, histogram of experts per token [E + 1], load of each expert [E]."""
    scores_TE = plan.scores_TE.detach()
    num_tokens, num_experts = scores_TE.shape
    experts_T = plan.experts_per_token_T
    selected_T = plan.selected_map_TE.sum(dim=1)
    share_TE = scores_TE / scores_TE.sum(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    best_T2 = scores_TE.topk(min(2, num_experts), dim=1).values
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
    # Not bincount, for which the host waits.
    histogram_K = (experts_T[:, None] == torch.arange(num_experts + 1, device=scores_TE.device)).sum(dim=0)
    return torch.cat([torch.stack([value.double() for value in scalars]), histogram_K, plan.tokens_per_expert_E])


@dataclass(frozen=True)
class LayerCounts:
    """The vector of :func:`pack`, summed over micro-batches and ranks, with its parts by name."""

    packed: Tensor
    num_experts: int

    @property
    def histogram_K(self) -> Tensor:
        """Tokens that used 0, 1, ..., E experts, [E + 1]."""
        return self.packed[len(_SCALARS) : len(_SCALARS) + self.num_experts + 1]

    @property
    def load_E(self) -> Tensor:
        """Tokens that each expert computed, [E]."""
        return self.packed[len(_SCALARS) + self.num_experts + 1 :]

    def scalar(self, name: str) -> float:
        return self.packed[_SCALARS.index(name)].item()

    def quantile_of_experts(self, percent: int) -> int:
        """Smallest K such that at least ``percent`` % of the tokens use K experts or fewer; exact."""
        cumulative = self.histogram_K.cumsum(0)
        return int((cumulative * 100 < percent * cumulative[-1]).sum())


def summarize(counts: LayerCounts, active_experts: int, most_experts: int, expert_parallel: int) -> dict[str, float]:
    """Figures of one layer under the names of the metrics file.

    Args:
        counts: sums over all ranks and micro-batches of a step.
        active_experts: number of experts that are not masked off.
        most_experts: the most experts that a token can use.
        expert_parallel: ranks over which the experts are spread, in equal consecutive blocks.
    """
    tokens = counts.scalar("tokens")
    histogram_K, load_E = counts.histogram_K, counts.load_E
    routes, selected = load_E.sum().item(), counts.scalar("selected_routes")
    mean_load = routes / active_experts
    used = torch.arange(histogram_K.shape[0], dtype=histogram_K.dtype, device=histogram_K.device)[histogram_K > 0]
    # Masked experts have no load: the variance is over the active ones.
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
