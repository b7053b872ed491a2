"""The one record that every router makes and every consumer reads."""

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
        gates_TE: fp32 weights of the expert outputs; 0 where ``routing_map_TE`` is False. Carries gradients.
        routing_map_TE: bool; True where the expert computes the token.
        selected_map_TE: bool; what the router chose before capacity dropped routes (routed + dropped = selected).
        scores_TE: fp32, not negative: softmax probabilities, sigmoid scores or ReLU activations. Carries gradients.
        logits_TE: what the scores were made of, fp32, those of null experts at the end; None for routers without.
        unclaimed_T: bool; tokens that no expert's threshold let in, whether or not a floor gave them one. None for
            routers in which that cannot happen.
        choice_TE: the selection as 0 and 1 in fp32, with the straight-through gradient of top_any; else None.
    """

    gates_TE: Tensor
    routing_map_TE: Tensor
    selected_map_TE: Tensor
    scores_TE: Tensor
    logits_TE: Tensor | None = None
    unclaimed_T: Tensor | None = None
    choice_TE: Tensor | None = None

    @property
    def experts_per_token_T(self) -> Tensor:
        """Number of experts that compute each token, int64 [T]."""
        return self.routing_map_TE.sum(dim=1)

    @property
    def tokens_per_expert_E(self) -> Tensor:
        """Number of tokens that each expert computes, int64 [E]."""
        return self.routing_map_TE.sum(dim=0)

    def keep(self, kept_map_TE: Tensor) -> RoutingPlan:
        """The same plan with the routes outside ``kept_map_TE`` (bool) dropped; the selection stays on record."""
        return dataclasses.replace(
            self,
            gates_TE=self.gates_TE.masked_fill(~kept_map_TE, 0.0),
            routing_map_TE=self.routing_map_TE & kept_map_TE,
        )


@dataclass(frozen=True)
class RoutingCounts:
    """Counts over the tokens of every rank that shares an auxiliary loss. Constants to autograd.

    A loss that multiplies these global counts with means over local tokens has the value and the gradient of the
    same loss over all tokens at once, after the average over ranks that data parallelism takes anyway.

    Attributes:
        selected_E: tokens that selected each expert, fp32.
        num_tokens: tokens, fp32 scalar.
        num_routed_tokens: tokens that selected at least one expert, fp32 scalar.
        num_parts: what the counts were summed over: ranks, times the forward passes of each.
    """

    selected_E: Tensor
    num_tokens: Tensor
    num_routed_tokens: Tensor
    num_parts: int = 1

    @classmethod
    def of(cls, plan: RoutingPlan) -> RoutingCounts:
        """Counts of the tokens of this rank alone."""
        selected_TE = plan.selected_map_TE
        num_tokens = torch.full((), float(selected_TE.shape[0]), device=selected_TE.device)
        return cls(selected_TE.sum(dim=0).float(), num_tokens, selected_TE.any(dim=1).sum().float())

    @classmethod
    def unpack(cls, packed: Tensor, num_parts: int) -> RoutingCounts:
        """The counts of a vector of :meth:`pack`, which may be a sum over ``num_parts`` ranks."""
        return cls(packed[:-2], packed[-2], packed[-1], num_parts)

    def pack(self) -> Tensor:
        """All counts in one vector, [E + 2]."""
        return torch.cat([self.selected_E, self.num_tokens.view(1), self.num_routed_tokens.view(1)])

    def __add__(self, other: RoutingCounts) -> RoutingCounts:
        """Counts over the tokens of both."""
        return RoutingCounts.unpack(self.pack() + other.pack(), self.num_parts + other.num_parts)

    @property
    def tokens_per_rank(self) -> Tensor:
        """Tokens of one rank in one pass."""
        return self.num_tokens / self.num_parts

    @property
    def routed_tokens_per_rank(self) -> Tensor:
        return self.num_routed_tokens.clamp(min=1) / self.num_parts


class Weights(Protocol):
    """Weights of sums over tokens, given counts; constants to autograd."""

    def __call__(self, counts: Any, /) -> Tensor: ...


class LateCounts:
    """Counts that are still on their way between ranks; a loss may be made of them before they arrive.

    Attributes:
        shape: of the tensor that is under way.
    """

    shape: torch.Size

    def weigh(self, sums: Tensor, weights: Weights) -> Tensor:
        """What :func:`weigh` gives: the backward pass waits for the counts, and the value is NaN until they arrive."""
        raise NotImplementedError


def weigh(sums: Tensor, counts: Any, weights: Weights) -> Tensor:
    """Sum of ``weights(counts) * sums``, the form of every loss that counts.

    Args:
        sums: over this rank's tokens, with gradients.
        counts: over the tokens of all ranks; may be :class:`LateCounts`.
        weights: what the counts make of each sum.
    """
    if isinstance(counts, LateCounts):
        return counts.weigh(sums, weights)
    return (weights(counts) * sums).sum()
