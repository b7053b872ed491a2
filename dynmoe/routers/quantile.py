"""Quantile routing (https://kexue.fm/archives/11626): each expert takes the same share of the tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from dynmoe.errors import ConfigError
from dynmoe.fields import option
from dynmoe.routers.base import BudgetStep, RouterState, TensorSpec, register
from dynmoe.routers.parts import BalancedRouter, LinearRouter, ThresholdRouter, experts_to_select

if TYPE_CHECKING:
    from torch import Tensor

    from dynmoe.routing.plan import RoutingPlan
    from dynmoe.routing.update_statistics import UpdateStatistics


@register("quantile")
class Quantile(LinearRouter, ThresholdRouter, BalancedRouter):
    """Selects every expert whose logit exceeds the (1 - K/E)-quantile of that expert's logits.

    The published rule is ``thresholds=running``: the thresholds are moving averages, and the choice for a token depends
    on no other token. With ``batch``, training uses the quantile of the forward pass itself, which gives exact loads
    but depends on later tokens. Both keep the moving averages, ``offset_E``, which evaluation uses.
    """

    HAS_OWN_RULE: ClassVar[bool] = True
    HOLDS_GLOBALLY: ClassVar[bool] = False
    NEEDS_HISTOGRAM: ClassVar[bool] = True
    BALANCES_SEQUENCES: ClassVar[bool] = True

    thresholds: str = option(
        "batch", "thresholds in training: quantiles of the forward pass over all ranks (exact load, but a choice "
        "depends on later tokens), or moving averages, as in evaluation", choices=("batch", "running"),
    )  # fmt: skip
    bins: int = option(1024, "bins of the histogram from which an expert's quantile is read", at_least=16, at_most=1024)
    cutoff_decay: float = option(0.9, "decay of the moving average of the cut-offs", at_least=0, below=1)

    @property
    def selects_among(self) -> str:
        return "batch" if self.thresholds == "batch" else "token"

    def check_tokens(self, per_pass: int, per_step: int) -> None:
        batch = self.thresholds == "batch"
        tokens = per_pass if batch else per_step
        if tokens < self.bins:
            problem = f"exceeds the {tokens} tokens of {'a forward pass over all ranks' if batch else 'a step'}"
            more = "train.micro_batch" if batch else "train.global_batch"
            cure = f"use at most {tokens}, or increase {more}" if tokens >= 16 else f"increase {more}"
            raise ConfigError("model.router.bins", self.bins, problem, cure)

    def buffers(self, hidden: int, num_experts: int) -> dict[str, TensorSpec]:
        # Without initial_experts, the first batch gives thresholds for the budget.
        return super().buffers(hidden, num_experts) | {"calibrated": TensorSpec((), False, "bool")}

    def threshold_scores_E(self, state: RouterState) -> Tensor:
        scores_E: Tensor = state.offset_E.sigmoid()
        return scores_E

    def calibration_TE(self, state: RouterState, x_TD: Tensor) -> Tensor:
        return self.logits_TE(state, x_TD)

    def route(self, state: RouterState, x_TD: Tensor) -> RoutingPlan:
        from dynmoe.routing.quantile import quantile_choice

        logits_TE = self.logits_TE(state, x_TD)
        of_batch = state.training and self.thresholds == "batch"
        thresholds_E = self.batch_thresholds_E(state, logits_TE) if of_batch else state.offset_E
        return quantile_choice(logits_TE, thresholds_E, **self.arguments("renormalize"))

    def batch_thresholds_E(self, state: RouterState, logits_TE: Tensor) -> Tensor:
        """The quantiles of this forward pass over all ranks, in one collective."""
        from dynmoe.routing.quantile import quantile_histogram, quantile_thresholds

        share = experts_to_select(self.kind, state) / logits_TE.shape[1]
        counts_EC = state.scope.sum(quantile_histogram(logits_TE, state.offset_E, self.bins).int())
        return quantile_thresholds(counts_EC, share, state.offset_E)

    def histogram_EC(self, state: RouterState, plan: RoutingPlan) -> Tensor:
        from dynmoe.routing.quantile import quantile_histogram

        assert plan.logits_TE is not None
        return quantile_histogram(plan.logits_TE, state.offset_E, self.bins)

    def update(self, state: RouterState, seen: UpdateStatistics, budget: BudgetStep) -> None:
        from dynmoe.routing.histogram import move_cutoffs
        from dynmoe.routing.quantile import quantile_thresholds

        assert seen.histogram_EC is not None
        assert budget.target is not None
        share = budget.target / len(seen.histogram_EC)
        found_E = quantile_thresholds(seen.histogram_EC, share, state.offset_E)
        state.offset_E.copy_(move_cutoffs(state.offset_E, found_E, self.cutoff_decay))
