"""What describes a router: its configuration, its tensors, and the functions that route, control and lose by them.

This file and the routers next to it import no torch at the top: the configuration consists of them, and is checked
before anything heavy is loaded. Methods that compute import what they need.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, TypeVar, dataclass_transform

from dynmoe.errors import ConfigError
from dynmoe.fields import Section, option

if TYPE_CHECKING:
    from torch import Tensor

    from dynmoe.routing.control_statistics import ControlStatistics
    from dynmoe.routing.plan import LateCounts, RoutingCounts, RoutingPlan


@dataclass(frozen=True)
class TensorSpec:
    """A parameter or buffer of a router.

    Attributes:
        shape: its shape.
        initial: the value of all its elements at the start; None draws them from a normal distribution.
        dtype: as torch calls it.
        export: how an export keeps it: as a ``tensor``, as a number in config.json (``config``), or None: not at all.
    """

    shape: tuple[int, ...] = ()
    initial: float | bool | None = 0.0
    dtype: str = "float32"
    export: str | None = None


def without_shape(name: str) -> str:
    """A tensor's name without the letters of its shape: ``weight`` of ``weight_ED``."""
    stem, _, letters = name.rpartition("_")
    return stem if stem and letters.isupper() else name


class RouterState(Protocol):
    """The tensors of a router as attributes, under the names of its :class:`RouterSpec`."""

    training: bool

    def linear(self, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        """x · Wᵀ in fp32, [T, E]."""
        ...

    def __getattr__(self, name: str) -> Any: ...


@dataclass(frozen=True)
class BudgetStep:
    """What a router's update rule is given after an optimizer step.

    Attributes:
        method: ``budget.method``.
        proportional, integral: gains of the PI controller.
        rate: step of loss-free balancing; None takes the router's own.
        experts_per_token: what counts against the target: the mean of this layer, or of all layers.
        target: experts per token to hold; None where nothing is held.
    """

    method: str
    proportional: float
    integral: float
    rate: float | None
    experts_per_token: Tensor
    target: float | None


class LossInputs:
    """What an auxiliary loss is computed from: one forward pass of one layer on this rank.

    Attributes:
        spec: of the router, resolved.
        state: its tensors.
        plan: of this rank's tokens, before capacity drops routes.
        target_experts: experts per token that the budget asks for.
    """

    target_experts: float = 1.0

    def __init__(self, spec: Any, state: RouterState, plan: RoutingPlan) -> None:
        self.spec = spec
        self.state = state
        self.plan = plan

    @property
    def counts(self) -> RoutingCounts | LateCounts | None:
        """Counts over all tokens of the configured scope; None stands for the plan's own tokens."""
        return None

    @property
    def sequence_counts(self) -> tuple[Tensor | LateCounts, int]:
        """Counts of each whole sequence, [B, E], and the number of ranks that a sequence is spread over."""
        raise NotImplementedError


LossFunction = Callable[[LossInputs], "Tensor"]


def by_variant(otherwise: Any, meaning: str, **bounds: Any) -> Any:
    """A field that may be null: then it has the variant's value, or ``otherwise`` where the variant names none."""
    return option(None, f"{meaning}; null: by the variant", otherwise=otherwise, **bounds)


def auxiliary(loss: LossFunction, meaning: str) -> Any:
    """The field ``NAME_loss``: coefficient of the auxiliary loss NAME, which ``loss`` computes."""
    return option(None, f"coefficient of {meaning}; null: by the variant", at_least=0, otherwise=0.0, loss=loss)


@dataclass
class RouterSpec(Section):
    """The description of one kind of router, and its section ``model.router`` of the configuration.

    A subclass declares fields and tensors and says how it routes. Configuration, sizes, plans, statistics, engines,
    exports and warm starts read it and know no router by name. Where a method takes ``state``, those are the tensors of
    one layer's router; whoever calls it has switched autograd off, but for :meth:`route` and the losses.
    """

    _section: ClassVar[str] = "model.router"
    # What each variant sets, where that is not the field's default.
    VARIANTS: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": {}}
    # Budget methods that can move this router, besides none; whether it has a rule of its own, without a method.
    BUDGET_METHODS: ClassVar[tuple[str, ...]] = ()
    HAS_OWN_RULE: ClassVar[bool] = False
    # Whether the mean over layers can be held in place of each layer's.
    HOLDS_GLOBALLY: ClassVar[bool] = True
    # Name of ``control_value`` among the metrics.
    CONTROL_METRIC: ClassVar[str] = "router_threshold_mean"
    # What the update rule needs to see: how scores deviate from thresholds, or counts of scores.
    NEEDS_DEVIATION: ClassVar[bool] = False
    NEEDS_HISTOGRAM: ClassVar[bool] = False
    # Whether experts can be added and removed while training.
    ADAPTS: ClassVar[bool] = False
    # Whether its losses can count each sequence by itself.
    BALANCES_SEQUENCES: ClassVar[bool] = False

    kind: str = option("", "how experts are chosen for a token")
    variant: str = option(
        "paper", "the paper's definition, what its code does, or the paper's with our defaults",
        choices=("paper", "released", "improved"),
    )  # fmt: skip
    lr_factor: float = option(1.0, "learning rate of router weights relative to optimizer.lr", above=0)
    balance_scope: str = option(
        "global_batch", "tokens whose load is balanced: of all ranks and micro-batches of the step so far, of one "
        "micro-batch on one rank, or of each sequence", choices=("global_batch", "micro_batch", "sequence"),
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in self.VARIANTS:
            known = " or ".join(self.VARIANTS)
            problem = f"the {self.kind} router has no such variant"
            raise ConfigError(f"{self._section}.variant", self.variant, problem, f"use {known}")
        if self.balance_scope == "sequence" and not self.BALANCES_SEQUENCES:
            problem = f"the {self.kind} router balances over batches only"
            cure = "use global_batch or micro_batch"
            raise ConfigError(f"{self._section}.balance_scope", self.balance_scope, problem, cure)
        most = getattr(self, "max_experts", None)
        fewest = self.min_experts_per_token
        if most is not None and most < fewest:
            cure = f"use at least model.router.min_experts ({fewest})"
            raise ConfigError(f"{self._section}.max_experts", most, "is below min_experts", cure)

    @property
    def resolved(self) -> Self:
        """The same with every null field that a variant decides filled in."""
        fallbacks = {
            field.name: field.metadata["otherwise"]
            for field in dataclasses.fields(self)
            if "otherwise" in field.metadata
        }
        decided = fallbacks | dict(self.VARIANTS[self.variant])
        resolved = copy.copy(self)
        vars(resolved).update({name: value for name, value in decided.items() if getattr(self, name) is None})
        return resolved

    @classmethod
    def has_field(cls, name: str) -> bool:
        return name in cls.__dataclass_fields__

    def arguments(self, *names: str) -> dict[str, Any]:
        """Fields as arguments of a routing function."""
        return {name: getattr(self, name) for name in names}

    # Experts of a token

    @property
    def min_experts_per_token(self) -> int:
        """The fewest experts that a token can have."""
        return getattr(self.resolved, "min_experts", 0)

    def max_experts_per_token(self, num_experts: int) -> int:
        """The most experts that a token can have in a layer of ``num_experts``."""
        return min(getattr(self, "max_experts", None) or num_experts, num_experts)

    @property
    def fixed_experts(self) -> int | None:
        """Experts of every token, where the router fixes them; None where they are dynamic."""
        return None

    @property
    def expected_experts(self) -> float | None:
        """Experts per token to plan with; None where training decides."""
        return self.fixed_experts

    def check_layers(self, smallest: int, largest: int) -> None:
        """Raises a ConfigError where this router does not fit layers of ``smallest`` to ``largest`` experts."""
        most = getattr(self, "max_experts", None)
        # A limit that a small layer never reaches does no harm; one that no layer reaches is a mistake.
        if most is not None and most > largest:
            cure = f"use at most model.moe.experts ({largest})"
            raise ConfigError("model.router.max_experts", most, "is more than there are experts", cure)
        rows = smallest + self.num_null_experts
        for name in ("min_experts", "initial_experts", "k"):
            value = getattr(self, name, None)
            if value is not None and value > rows:
                limit = "the real and null experts" if self.num_null_experts else "model.moe.experts"
                cure = f"use at most {limit} ({rows})"
                raise ConfigError(f"model.router.{name}", value, "is more than there are experts", cure)

    @property
    def num_null_experts(self) -> int:
        """Experts that a token can choose and that compute nothing."""
        return 0

    # Tensors

    def parameters(self, hidden: int, num_experts: int) -> dict[str, TensorSpec]:
        """What gradients train, by name; the part of a name behind its last underscore says the shape."""
        raise NotImplementedError

    def buffers(self, hidden: int, num_experts: int) -> dict[str, TensorSpec]:
        """What is moved outside autograd, fp32 whatever the precision of the model; all of it goes into checkpoints."""
        return {}

    # Losses

    @property
    def losses(self) -> dict[str, LossFunction]:
        """The auxiliary losses in force, in the order of their fields."""
        resolved = self.resolved
        return {
            field.name.removesuffix("_loss"): field.metadata["loss"]
            for field in dataclasses.fields(self)
            if "loss" in field.metadata and getattr(resolved, field.name) > 0
        }

    def loss_coefficients(self, state: RouterState | None = None) -> dict[str, Any]:
        """The coefficient of each loss in force; of those that are state, where ``state`` is given."""
        resolved = self.resolved
        return {name: getattr(resolved, f"{name}_loss") for name in self.losses if self.has_field(f"{name}_loss")}

    # What is computed; ``self`` is resolved here

    def route(self, state: RouterState, x_TD: Tensor) -> RoutingPlan:
        """The plan of these tokens."""
        raise NotImplementedError

    def control_value(self, state: RouterState) -> Tensor:
        """What decides how many experts a token gets, a scalar: k, p, the L1 coefficient or the mean threshold."""
        raise NotImplementedError

    def compared_TE(self, state: RouterState, plan: RoutingPlan) -> Tensor:
        """What the plan compared with thresholds, where the router ``NEEDS_DEVIATION``."""
        raise NotImplementedError

    def calibration_TE(self, state: RouterState, x_TD: Tensor) -> Tensor:
        """What ``offset_E`` is compared with, where first scores set it."""
        raise NotImplementedError

    def update(self, state: RouterState, seen: ControlStatistics, budget: BudgetStep) -> None:
        """Moves the buffers after a step that saw ``seen``, towards the budget's target."""

    def new_expert(
        self, state: RouterState, slot: int, active_E: Tensor, at_median: bool
    ) -> dict[str, tuple[tuple[int | slice, ...], Tensor]]:
        """Fresh values for the expert in ``slot``, where the router ``ADAPTS``: by parameter its index and its value.

        Args:
            state: whose window says which tokens the expert is for.
            slot: index of the expert.
            active_E: the experts in use without it.
            at_median: start at the median of the thresholds in force, not at 0.
        """
        raise NotImplementedError

    # Exports and warm starts

    @property
    def served_fields(self) -> tuple[str, ...]:
        """Fields that may be set anew when an export is served."""
        return ()

    def upcycling_fields(self, granularity: int) -> dict[str, Any]:
        """Fields with which experts copied from a dense layer, ``granularity`` of them together, compute the same."""
        wanted = {"renormalize": True, "min_experts": granularity}
        return {name: value for name, value in wanted.items() if self.has_field(name)}


ROUTERS: dict[str, type[RouterSpec]] = {}


def router_of(settings: Mapping[str, Any]) -> RouterSpec:
    """The router with these settings, by ``kind``; settings that are no fields of it are ignored.

    Raises:
        ConfigError: there is no such router, or a setting is out of range.
    """
    kind = settings["kind"]
    if kind not in ROUTERS:
        raise ConfigError("router.kind", kind, "is not known", f"use one of {', '.join(ROUTERS)}")
    spec = ROUTERS[kind]
    return spec(**{name: value for name, value in settings.items() if spec.has_field(name)})


_Spec = TypeVar("_Spec", bound=RouterSpec)


@dataclass_transform()
def register(kind: str) -> Callable[[type[_Spec]], type[_Spec]]:
    """Makes a dataclass of a description and enters it as ``model.router.kind``."""

    def enter(spec: type[_Spec]) -> type[_Spec]:
        spec.__annotations__["kind"] = "str"
        spec.kind = option(kind, "how experts are chosen for a token")
        ROUTERS[kind] = dataclass(spec)
        return spec

    return enter
