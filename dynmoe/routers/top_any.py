"""Top-any: DynMoE (arXiv 2405.14297). Every expert has a prototype and a threshold; experts are added and removed."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Optional, Self

from dynmoe.errors import ConfigError
from dynmoe.fields import option
from dynmoe.routers.base import LossInputs, RouterState, TensorSpec, auxiliary, by_variant, register
from dynmoe.routers.parts import HeldThresholdRouter, LimitedRouter

if TYPE_CHECKING:
    from torch import Tensor

    from dynmoe.routing.plan import RoutingPlan


def _counted_E(inputs: LossInputs) -> Tensor | None:
    """Mask of the experts that losses count; None for all slots, as in the released code."""
    return None if inputs.spec.variant == "released" else inputs.state.active_E


def top_any_balance_term(inputs: LossInputs) -> Tensor:
    """Load balance with gradients through the gates (as released) or through the choice (improved)."""
    from dynmoe.routing.losses import choice_balance, gate_balance

    if inputs.spec.variant == "improved":
        return choice_balance(inputs.plan, inputs.state.active_E, inputs.counts)
    per_route = inputs.spec.balance_per_route
    return gate_balance(inputs.plan, inputs.counts, active_E=_counted_E(inputs), per_route=per_route)


def diversity_term(inputs: LossInputs) -> Tensor:
    """Similarity of the prototypes."""
    from dynmoe.routing.losses import diversity

    return diversity(inputs.state.prototypes_DE, inputs.state.active_E)


def simplicity_term(inputs: LossInputs) -> Tensor:
    """Norms of the prototypes."""
    from dynmoe.routing.losses import simplicity

    return simplicity(inputs.state.prototypes_DE, _counted_E(inputs))


def efficiency_term(inputs: LossInputs) -> Tensor:
    """Mean number of selected experts, as a share of all."""
    from dynmoe.routing.losses import efficiency

    return efficiency(inputs.plan, active_E=_counted_E(inputs))


_PAPER = {"diversity_loss": 1e-2, "simplicity_loss": 1e-2}


@register("top_any")
class TopAny(HeldThresholdRouter, LimitedRouter):
    """Selects every expert whose cosine with the token exceeds its threshold (eq. 3 to 6).

    The ``window_*`` buffers are recorded by adaptation. The released code has its balance and efficiency losses since
    January 2025.
    """

    VARIANTS: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": _PAPER,
        "released": _PAPER | {
            "balance_loss": 1e-2, "efficiency_loss": 1e-2, "straight_through": "selected", "min_experts": 0,
        },
        "improved": _PAPER | {
            "balance_loss": 1e-2, "weights": "score", "renormalize": True, "temperature": "sqrt_hidden",
            "initial_experts": 2.0,
        },
    }  # fmt: skip
    ADAPTS: ClassVar[bool] = True
    LIMITS_GROUPS: ClassVar[bool] = True

    weights: Optional[str] = by_variant(
        "uniform", "gates of the selected experts: 1/K each, or their scores", choices=("uniform", "score")
    )
    renormalize: Optional[bool] = by_variant(False, "make the gates of a token sum to 1")
    straight_through: Optional[str] = by_variant(
        "all", "experts to which the step function passes a gradient", choices=("all", "selected")
    )
    temperature: Optional[str] = by_variant(
        "fixed", "factor on cosines: scale, scale * sqrt(model.hidden), or a parameter that starts at the latter",
        choices=("fixed", "sqrt_hidden", "learned"),
    )  # fmt: skip
    scale: float = option(1.0, "factor on cosines, see temperature", above=0)
    balance_loss: Optional[float] = auxiliary(top_any_balance_term, "the load-balancing loss")
    balance_per_route: Optional[bool] = by_variant(
        False, "divide the load-balancing loss by the observed experts per token"
    )
    diversity_loss: Optional[float] = auxiliary(diversity_term, "the similarity of prototypes")
    simplicity_loss: Optional[float] = auxiliary(simplicity_term, "the norms of prototypes")
    efficiency_loss: Optional[float] = auxiliary(efficiency_term, "the mean share of selected experts")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant == "released" and self.min_experts_per_token:
            problem = "the released variant has no minimum"
            cure = "remove it, or use variant=paper"
            raise ConfigError("model.router.min_experts", self.min_experts, problem, cure)
        if self.resolved.weights == "uniform" and self.renormalize is False:
            cure = "remove it, or use weights=score"
            raise ConfigError("model.router.renormalize", False, "uniform gates always sum to 1", cure)

    @property
    def resolved(self) -> Self:
        resolved = super().resolved
        if resolved.weights == "uniform":  # gates sum to 1 anyway
            resolved.renormalize = None
        return resolved

    def parameters(self, hidden: int, num_experts: int) -> dict[str, TensorSpec]:
        tensors = {
            "prototypes_DE": TensorSpec((hidden, num_experts), None, export="tensor"),
            "thresholds_E": TensorSpec((num_experts,), export="tensor"),
        }
        resolved = self.resolved
        if resolved.temperature == "learned":
            tensors["log_scale"] = TensorSpec((1,), math.log(resolved._initial_scale(hidden)), export="tensor")
        return tensors

    def buffers(self, hidden: int, num_experts: int) -> dict[str, TensorSpec]:
        return super().buffers(hidden, num_experts) | {
            "window_selected_E": TensorSpec((num_experts,), dtype="float64"),
            "window_unclaimed_D": TensorSpec((hidden,), dtype="float64"),
            "window_unclaimed": TensorSpec(dtype="float64"),
            "window_tokens": TensorSpec(dtype="float64"),
        }

    def _initial_scale(self, hidden: int) -> float:
        return self.scale * (1.0 if self.temperature == "fixed" else math.sqrt(hidden))

    def factor(self, state: RouterState) -> Tensor | float:
        """The factor on cosines and thresholds."""
        if self.temperature == "learned":
            factor: Tensor = state.log_scale.float().exp()
            return factor
        return self._initial_scale(state.prototypes_DE.shape[0])

    def base_E(self, state: RouterState) -> Tensor:
        return state.thresholds_E.float()

    def threshold_scores_E(self, state: RouterState) -> Tensor:
        return (self.factor(state) * (self.base_E(state) + state.offset_E)).sigmoid()

    def calibration_TE(self, state: RouterState, x_TD: Tensor) -> Tensor:
        from dynmoe.routing.top_any import cosines

        return cosines(x_TD, state.prototypes_DE) - self.base_E(state)

    def compared_TE(self, state: RouterState, plan: RoutingPlan) -> Tensor:
        assert plan.logits_TE is not None
        return plan.logits_TE / self.factor(state)

    def route(self, state: RouterState, x_TD: Tensor) -> RoutingPlan:
        from dynmoe.routing.top_any import top_any

        return top_any(
            x_TD, state.prototypes_DE, self.base_E(state) + state.offset_E, state.active_E,
            variant="released" if self.variant == "released" else "paper", training=state.training,
            scale=self.factor(state),
            **self.arguments("straight_through", "weights", "renormalize", "min_experts", "max_experts"),
            **self.arguments("n_group", "topk_group"),
        )  # fmt: skip

    def reroute(self, plan: RoutingPlan, selected_TE: Tensor) -> RoutingPlan:
        """The straight-through gradient remains that of this router's own choice."""
        from dynmoe.routing.top_any import top_any_plan

        assert plan.choice_TE is not None
        gates = self.arguments("weights", "renormalize")
        return top_any_plan(selected_TE, plan.choice_TE, plan.scores_TE, plan.logits_TE, plan.unclaimed_T, **gates)

    def new_expert(
        self, state: RouterState, slot: int, active_E: Tensor, at_median: bool
    ) -> dict[str, tuple[tuple[int | slice, ...], Tensor]]:
        offset = state.offset_E.new_zeros(())
        if at_median:
            # The median is robust against single thresholds that no token reaches.
            offset = (self.base_E(state) + state.offset_E)[active_E.to(state.offset_E.device)].median()
        state.offset_E[slot] = offset
        # The prototype is the normalized sum of the router inputs of unclaimed tokens.
        prototype_D = (state.window_unclaimed_D / state.window_unclaimed_D.norm()).float()
        return {
            "thresholds_E": ((slot,), offset.new_zeros(())),
            "prototypes_DE": ((slice(None), slot), prototype_D),
        }

    @property
    def served_fields(self) -> tuple[str, ...]:
        return ("max_experts",) if self.variant == "released" else super().served_fields

    def upcycling_fields(self, granularity: int) -> dict[str, Any]:
        return {"min_experts": granularity}
