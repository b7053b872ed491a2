"""The result of every router: which experts compute which tokens, and the counts that losses take from it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class RoutingPlan:
    """Which experts compute which tokens, and with what weight.

    Attributes:
        gates_TE: fp32 weights of the expert outputs; 0 where ``routing_map_TE`` is False. Has gradients.
        routing_map_TE: bool; True where the expert computes the token.
        selected_map_TE: bool; the router's selection before capacity drops routes (selected = routed + dropped).
        scores_TE: fp32, not negative: softmax probabilities, sigmoid scores or ReLU activations. Has gradients.
        logits_TE: fp32 logits of the scores, also of inactive experts, followed by those of zero-computation experts;
            None if a router of one's own has none.
        unclaimed_T: bool; tokens that exceed no expert's threshold, even if a floor adds an expert. None for routers
            in which this cannot happen.
        choice_TE: fp32 selection (0 or 1) with the straight-through gradient of top_any; None for other routers.
        local_TD: part of the output that the router computes on the token's own rank; has gradients. None for routers
            without zero-computation experts.
    """

    gates_TE: Tensor
    routing_map_TE: Tensor
    selected_map_TE: Tensor
    scores_TE: Tensor
    logits_TE: Tensor | None = None
    unclaimed_T: Tensor | None = None
    choice_TE: Tensor | None = None
    local_TD: Tensor | None = None

    @property
    def experts_per_token_T(self) -> Tensor:
        """Number of experts that compute each token, int64."""
        return self.routing_map_TE.sum(dim=1)

    @property
    def tokens_per_expert_E(self) -> Tensor:
        """Number of tokens that each expert computes, int64."""
        return self.routing_map_TE.sum(dim=0)

    def mask(self, mask_TE: Tensor) -> RoutingPlan:
        """The plan without the routes outside ``mask_TE`` (bool); ``selected_map_TE`` is unchanged."""
        gates_TE = self.gates_TE.masked_fill(~mask_TE, 0.0)
        return dataclasses.replace(self, gates_TE=gates_TE, routing_map_TE=self.routing_map_TE & mask_TE)


@dataclass(frozen=True)
class RoutingCounts:
    """Counts over the tokens of all ranks that share an auxiliary loss; constants to autograd.

    A loss that multiplies these global counts by means over local tokens has, after the average over data-parallel
    ranks, the value and the gradient of the same loss over all tokens at once.

    Attributes:
        selected_E: number of tokens that selected each expert, fp32.
        num_tokens: number of tokens, fp32 scalar.
        num_routed_tokens: number of tokens that selected at least one expert, fp32 scalar.
        num_parts: number of summed parts: ranks, times the forward passes of each.
    """

    selected_E: Tensor
    num_tokens: Tensor
    num_routed_tokens: Tensor
    num_parts: int = 1

    @classmethod
    def of(cls, plan: RoutingPlan) -> RoutingCounts:
        """Counts of the tokens of this rank."""
        selected_TE = plan.selected_map_TE
        num_tokens = torch.full((), float(selected_TE.shape[0]), device=selected_TE.device)
        return cls(selected_TE.sum(dim=0).float(), num_tokens, selected_TE.any(dim=1).sum().float())

    @classmethod
    def unpack(cls, packed: Tensor, num_parts: int) -> RoutingCounts:
        """The counts in a vector of :meth:`pack`, summed over ``num_parts`` ranks."""
        return cls(packed[:-2], packed[-2], packed[-1], num_parts)

    def pack(self) -> Tensor:
        """All counts in one vector, [E + 2]."""
        return torch.cat([self.selected_E, self.num_tokens.view(1), self.num_routed_tokens.view(1)])

    def __add__(self, other: RoutingCounts) -> RoutingCounts:
        return RoutingCounts.unpack(self.pack() + other.pack(), self.num_parts + other.num_parts)

    @property
    def tokens_per_rank(self) -> Tensor:
        """Tokens of one rank in one forward pass."""
        return self.num_tokens / self.num_parts

    @property
    def routed_tokens_per_rank(self) -> Tensor:
        return self.num_routed_tokens.clamp(min=1) / self.num_parts


class Weights(Protocol):
    """Computes the weights of sums over tokens from counts; constants to autograd."""

    def __call__(self, counts: Any, /) -> Tensor: ...


class AsyncCounts:
    """Counts whose all-reduce may still be in progress; a loss can use them before it completes.

    Attributes:
        shape: of the reduced tensor.
    """

    shape: torch.Size

    def weigh(self, sums: Tensor, weights: Weights) -> Tensor:
        """See :func:`weigh`. The backward pass waits for the counts; the value is NaN until they arrive."""
        raise NotImplementedError


def weigh(sums: Tensor, counts: Any, weights: Weights) -> Tensor:
    """Sum of ``weights(counts) * sums``, the form of every loss that uses counts.

    Args:
        sums: over this rank's tokens, with gradients.
        counts: over the tokens of all ranks; may be :class:`AsyncCounts`.
        weights: computes the weight of each sum.
    """
    if isinstance(counts, AsyncCounts):
        return counts.weigh(sums, weights)
    return (weights(counts) * sums).sum()
