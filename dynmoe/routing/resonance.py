"""Expert-Token Resonance (arXiv 2406.00023): tokens choose experts, and experts choose among those tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from dynmoe.routing.histogram import NUM_BINS, kth_largest
from dynmoe.routing.pooled import best_pairs
from dynmoe.routing.scope import TokenScope
from dynmoe.routing.selection import rank_descending
from dynmoe.routing.top_any import cosines


def affinities(hidden_TD: Tensor, weight_D: Tensor, num_experts: int) -> Tensor:
    """Cosine of each token with each expert's weights, fp32 [T, E] (eq. 2 to 4).

    The weights of expert i are ``weight_D`` from feature i * D / E to (i + 1) * D / E, and 0 elsewhere. Equal weights
    make it grouped average pooling.
    """
    features = torch.arange(len(weight_D), device=weight_D.device)
    experts = torch.arange(num_experts, device=weight_D.device)
    owned_DE = (features * num_experts // len(weight_D)).unsqueeze(1) == experts
    return cosines(hidden_TD, owned_DE * weight_D.float().unsqueeze(1))


def chosen_by_tokens(affinity_TE: Tensor, k: int) -> Tensor:
    """(1 + affinity) / 2, at least 1 / 1,024, of the ``k`` experts that each token chooses (eq. 5); 0 elsewhere."""
    affinity_TE = affinity_TE.detach()
    strength_TE = (0.5 + 0.5 * affinity_TE).clamp(min=2.0 / NUM_BINS, max=1.0)
    return strength_TE.masked_fill(rank_descending(affinity_TE) >= k, 0.0)


def chosen_by_both(values_TE: Tensor, experts_per_token: float, scope: TokenScope) -> Tensor:
    """Mask of the pairs that the experts keep of :func:`chosen_by_tokens`: round(S * K) in each sequence, bool [T, E].

    The experts take turns, and each takes its best remaining token, until the pairs are used up. All experts thus have
    the same capacity, the smallest that suffices; in the last turn, those of highest affinity take a token.
    """
    values_BSE = scope.sequences(values_TE)
    order_BSE = values_BSE.sort(dim=1, descending=True, stable=True).indices
    turns_1S1 = torch.arange(values_BSE.shape[1], device=values_BSE.device).view(1, -1, 1)
    turn_BSE = torch.empty_like(order_BSE).scatter_(1, order_BSE, turns_1S1.expand_as(order_BSE))
    # A strength is below 1 after halving, so it decides within a turn only.
    priority_BSE = (0.5 * values_BSE.double() - turn_BSE).masked_fill(values_BSE == 0, -torch.inf)
    count = round(values_BSE.shape[1] * experts_per_token)
    return scope.own(best_pairs(priority_BSE.flatten(1), count).view_as(priority_BSE)) & (values_TE > 0)


def equal_capacity(chosen_E: Tensor, routes: Tensor) -> Tensor:
    """The capacity C at which sum(min(chosen, C)) is ``routes``, an fp64 scalar; infinite if all do not reach it."""
    sorted_E = chosen_E.double().sort().values
    num_experts = len(sorted_E)
    smaller_E = sorted_E.cumsum(0) - sorted_E
    left_E = num_experts - torch.arange(num_experts, device=sorted_E.device)
    capacity_E = (routes - smaller_E) / left_E  # if only the smaller ones are below it
    capacity = capacity_E.masked_fill(capacity_E > sorted_E, -torch.inf).amax()
    return capacity.where(routes <= sorted_E.sum(), torch.inf)


def resonance_cutoffs(histogram_EC: Tensor, routes: Tensor) -> Tensor:
    """The cut-offs of :func:`chosen_by_tokens` that leave each expert its capacity, fp32 [E].

    An expert with fewer tokens has the value below all of them, one without tokens 0. A cut-off thus does not jump when
    the load of an expert crosses the capacity, and its moving average stays between the values of tokens.
    """
    chosen_E = histogram_EC[:, 1:].sum(dim=1).double()
    cutoffs_E = kth_largest(histogram_EC, chosen_E.clamp(max=equal_capacity(chosen_E, routes)))
    return cutoffs_E.where(chosen_E > 0, 0.0).float()
