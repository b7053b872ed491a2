"""The base class of routers: configuration, tensors, routing, budget updates and auxiliary losses.

The modules of this package import torch within methods only: the configuration is made of them and is checked before
torch is loaded.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, TypeVar, dataclass_transform

from dynmoe.errors import ConfigError
from dynmoe.fields import Section, option

if TYPE_CHECKING:
    from torch import Tensor

    from dynmoe.routing.plan import AsyncCounts, RoutingCounts, RoutingPlan
    from dynmoe.routing.scope import TokenScope
    from dynmoe.routing.update_statistics import UpdateStatistics


@dataclass(frozen=True)
class TensorSpec:
    """A parameter or buffer of a router.

    Attributes:
        shape: its shape.
        initial: initial value of all elements; None draws them from a normal distribution.
        dtype: name of the torch dtype.
        export: where an export stores it: as a ``tensor``, as a number in config.json (``config``), or None: nowhere.
        by_budget: it determines the experts per token: with several budgets there is one for each, along the first
            dimension. The router sees the one of the budget in force.
    """

    shape: tuple[int, ...] = ()
    initial: float | bool | None = 0.0
    dtype: str = "float32"
    export: str | None = None
    by_budget: bool = False


def without_shape(name: str) -> str:
    """The name of a tensor without its shape suffix: ``weight`` for ``weight_ED``."""
    stem, _, letters = name.rpartition("_")
    return stem if stem and letters.isupper() else name


def at_budget(values: Tensor, budgets: Sequence[float], wanted: float) -> Tensor:
    """The value for ``wanted`` experts per token: a view of that of a budget, or interpolated between two of them.

    Args:
        values: a tensor with a value for each budget along the first dimension.
        budgets: experts per token, ascending.
        wanted: a number between the first and the last of them.
    """
    upper = len([budget for budget in budgets if budget < wanted])  # torch.compile cannot trace bisect
    if budgets[upper] == wanted:
        return values[upper]
    share = (wanted - budgets[upper - 1]) / (budgets[upper] - budgets[upper - 1])
    return values[upper - 1].lerp(values[upper], share)


class RouterState(Protocol):
    """The tensors of a router as attributes, by their names in its :class:`RouterSpec`.

    Attributes:
        training: False in evaluation and generation, where the choice for a token must not depend on later tokens.
        scope: the tokens of this forward pass, for routers whose choice in training depends on other tokens.
        target_experts: experts per token that the budget targets; None without a budget.
        importance_T: importance of the tokens in the layer's attention, for routers that need it; else None.
    """

    training: bool
    scope: TokenScope
    importance_T: Tensor | None

    @property
    def target_experts(self) -> float | None: ...

    def linear(self, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        """x · Wᵀ in fp32, [T, E]."""
        ...

    def __getattr__(self, name: str) -> Any: ...


@dataclass(frozen=True)
class BudgetStep:
    """The budget's settings and observation for one router update.

    Attributes:
        method: ``budget.method``.
        proportional, integral: gains of the PI controller.
        rate: step size of loss-free balancing; None for the router's default.
        experts_per_token: observed mean of this layer, or of all layers.
        target: experts per token to hold; None without a budget.
    """

    method: str
    proportional: float
    integral: float
    rate: float | None
    experts_per_token: Tensor
    target: float | None


class LossInputs:
    """Inputs of an auxiliary loss: one forward pass of one layer on this rank.

    Attributes:
        spec: of the router, resolved.
        state: tensors of the router.
        plan: of this rank's tokens, before capacity drops routes.
    """

    def __init__(self, spec: Any, state: RouterState, plan: RoutingPlan) -> None:
        self.spec = spec
        self.state = state
        self.plan = plan

    @property
    def counts(self) -> RoutingCounts | AsyncCounts | None:
        """Counts over all tokens of the configured scope; None if the plan has all of them."""
        return None

    @property
    def sequence_counts(self) -> tuple[Tensor | AsyncCounts, int]:
        """Counts of each whole sequence, [B, E], and the number of ranks over which a sequence is split."""
        raise NotImplementedError


LossFunction = Callable[[LossInputs], "Tensor"]


def by_variant(otherwise: Any, meaning: str, **metadata: Any) -> Any:
    """A field whose null value means the value of the variant, or ``otherwise`` if the variant does not set it."""
    return option(None, f"{meaning}; null: by the variant", otherwise=otherwise, **metadata)


def auxiliary(loss: LossFunction, meaning: str) -> Any:
    """The field ``NAME_loss``: the coefficient of auxiliary loss NAME, which ``loss`` computes."""
    return option(None, f"coefficient of {meaning}; null: by the variant", at_least=0, otherwise=0.0, loss=loss)


@dataclass
class RouterSpec(Section):
    """One kind of router, and the section ``model.router`` of its configuration.

    A subclass declares fields and tensors and implements the methods. Configuration, engines, exports and the other
    packages use only this interface, so they need no change for a new router. ``state`` holds the tensors of one
    layer's router; autograd is off except in :meth:`route` and the losses.
    """

    _section: ClassVar[str] = "model.router"
    # Fields that each variant sets to another value than the field's default.
    VARIANTS: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": {}}
    # Budget methods that can control this router, besides none.
    BUDGET_METHODS: ClassVar[tuple[str, ...]] = ()
    # True if the router holds a budget by its own rule, without a method.
    HAS_OWN_RULE: ClassVar[bool] = False
    # True if the budget can hold the mean over layers instead of each layer.
    HOLDS_GLOBALLY: ClassVar[bool] = True
    # Metric name of ``control_value``.
    CONTROL_METRIC: ClassVar[str] = "router_threshold_mean"
    # Statistics that ``update`` needs: deviations of scores; histograms, which budget.method=quantile always needs.
    NEEDS_DEVIATION: ClassVar[bool] = False
    NEEDS_HISTOGRAM: ClassVar[bool] = False
    # True if experts can be added and removed during training.
    ADAPTS: ClassVar[bool] = False
    # True if the losses can be computed for each sequence.
    BALANCES_SEQUENCES: ClassVar[bool] = False
    # True if each token takes exactly as many experts as are configured, or as the budget of the step says.
    SETS_NUMBER: ClassVar[bool] = False
    # The tokens on which the choice for a token depends in training: the token itself, its sequence, or the batch.
    SELECTS_AMONG: ClassVar[str] = "token"
    # True if it needs ``importance_T``.
    NEEDS_ATTENTION: ClassVar[bool] = False
    # True if plans have ``local_TD``.
    ADDS_OUTPUT: ClassVar[bool] = False
    # True if it can select within the best groups of experts of a token.
    LIMITS_GROUPS: ClassVar[bool] = False

    kind: str = option("", "routing method: how the experts of a token are chosen")
    variant: str = option(
        "paper", "the definition of the paper (paper), of its code (released), or the paper's with our defaults "
        "(improved)", choices=("paper", "released", "improved"),
    )  # fmt: skip
    lr_factor: float = option(1.0, "learning rate of router weights relative to optimizer.lr", above=0)
    balance_scope: str = option(
        "global_batch", "tokens over which the load is balanced: those of all ranks and micro-batches of the step so "
        "far, of one micro-batch on one rank, or of each sequence", choices=("global_batch", "micro_batch", "sequence"),
    )  # fmt: skip
    budgets: list[float] = option(
        [], "experts per token of which training uses a random one in each step, ascending; the model then runs with "
        "any number between the first and the last. []: one budget for all steps", above=0,
    )  # fmt: skip

    gate_scale: float = option(
        1.0, "factor on the gates, after renormalization (routed_scaling_factor of DeepSeek-V3 and LongCat-Flash)",
        above=0,
    )  # fmt: skip
    n_group: int = option(1, "groups of experts, in order and of equal size, see topk_group", at_least=1)
    topk_group: int = option(
        1, "groups whose experts a token may use: those with the highest sum of their two best experts (DeepSeek-V3). "
        "If each rank of parallel.expert has one group, a token is sent to as many ranks at most", at_least=1,
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in self.VARIANTS:
            known = " or ".join(self.VARIANTS)
            problem = f"is not a variant of the {self.kind} router"
            raise ConfigError(f"{self._section}.variant", self.variant, problem, f"use {known}")
        if self.balance_scope == "sequence" and not self.BALANCES_SEQUENCES:
            problem = f"the {self.kind} router cannot balance sequences"
            cure = "use global_batch or micro_batch"
            raise ConfigError(f"{self._section}.balance_scope", self.balance_scope, problem, cure)
        if self.n_group > 1 and not self.LIMITS_GROUPS:
            problem = f"the {self.kind} router does not select within groups of experts"
            raise ConfigError(f"{self._section}.n_group", self.n_group, problem, "use 1")
        if self.topk_group > self.n_group:
            cure = f"use at most model.router.n_group ({self.n_group})"
            raise ConfigError(f"{self._section}.topk_group", self.topk_group, "is more than there are groups", cure)
        self._check_budgets()
        most = getattr(self, "max_experts", None)
        fewest = self.min_experts_per_token
        if most is not None and most < fewest:
            cure = f"use at least model.router.min_experts ({fewest})"
            raise ConfigError(f"{self._section}.max_experts", most, "is below min_experts", cure)

    def _check_budgets(self) -> None:
        budgets = self.budgets
        if not budgets:
            return
        if not any(tensor.by_budget for tensor in self.buffers(1, 1).values()):
            problem = f"the {self.kind} router cannot change its experts per token from step to step"
            raise ConfigError(f"{self._section}.budgets", budgets, problem, "use []")
        if len(budgets) < 2 or sorted(set(budgets)) != budgets:
            problem = "must be at least two numbers in ascending order"
            raise ConfigError(f"{self._section}.budgets", budgets, problem, "sort and complete them, or use []")

    @property
    def resolved(self) -> Self:
        """A copy with the values of the variant in place of null."""
        fields = dataclasses.fields(self)
        values = {field.name: field.metadata["otherwise"] for field in fields if "otherwise" in field.metadata}
        values |= self.VARIANTS[self.variant]
        resolved = copy.copy(self)
        vars(resolved).update({name: value for name, value in values.items() if getattr(self, name) is None})
        return resolved

    @classmethod
    def has_field(cls, name: str) -> bool:
        return name in cls.__dataclass_fields__

    def arguments(self, *names: str) -> dict[str, Any]:
        """Fields as keyword arguments of a routing function."""
        return {name: getattr(self, name) for name in names}

    # Experts per token

    @property
    def min_experts_per_token(self) -> int:
        return getattr(self.resolved, "min_experts", 0)

    def max_experts_per_token(self, num_experts: int) -> int:
        """Maximum number of experts of a token in a layer of ``num_experts``."""
        usable = self.usable_experts(num_experts)
        return min(getattr(self, "max_experts", None) or usable, usable)

    def usable_experts(self, num_experts: int) -> int:
        """Number of experts of a layer of ``num_experts`` that are in the groups of a token."""
        return num_experts * self.topk_group // self.n_group

    @property
    def fixed_experts(self) -> int | None:
        """Experts per token if the router fixes them; None if they are dynamic."""
        return None

    @property
    def expected_experts(self) -> float | None:
        """Experts per token to plan with; None if they depend on training."""
        return sum(self.budgets) / len(self.budgets) if self.budgets else self.fixed_experts

    def check_budget(self, wanted: float, field: str) -> None:
        """Raises a ConfigError unless a model trained with this router can use ``wanted`` experts per token."""
        if not self.budgets:
            cure = "train with several model.router.budgets to choose one afterwards"
            raise ConfigError(field, wanted, "the model was trained with one budget", cure)
        if not self.budgets[0] <= wanted <= self.budgets[-1]:
            cure = f"use {self.budgets[0]:g} to {self.budgets[-1]:g}"
            raise ConfigError(field, wanted, "is outside the range of model.router.budgets", cure)

    def check_layers(self, sizes: Collection[int]) -> None:
        """Raises a ConfigError if this router does not fit layers of these numbers of experts."""
        smallest = min(sizes)
        largest = max(sizes)
        most = getattr(self, "max_experts", None)
        # A maximum above the size of a small layer is harmless; above that of every layer it is a mistake.
        if most is not None and most > largest:
            cure = f"use at most model.moe.experts ({largest})"
            raise ConfigError("model.router.max_experts", most, "is more than there are experts", cure)
        undivided = [size for size in sizes if size % self.n_group]
        if undivided:
            problem = f"does not divide the experts of a layer ({undivided[0]})"
            raise ConfigError("model.router.n_group", self.n_group, problem, "use a divisor of model.moe.experts")
        usable = self.usable_experts(smallest)
        rows = usable + self.num_zero_computation
        # Several budgets take the place of a number.
        numbers = {name: getattr(self, name, None) for name in ("min_experts", "initial_experts", "k")}
        if self.SETS_NUMBER and self.budgets:
            numbers = numbers | {"k": None, "budgets": self.budgets[-1]}
        for name, value in numbers.items():
            if value is not None and value > rows:
                free = self.num_zero_computation
                limit = "model.moe.experts" if usable == smallest else f"the experts of {self.topk_group} groups"
                limit = f"the {usable} experts and {free} zero-computation experts" if free else limit
                cure = f"use at most {limit} ({rows})"
                raise ConfigError(f"model.router.{name}", value, "is more than there are experts", cure)

    def without_idle_maximum(self, sizes: Collection[int]) -> Self:
        """The router without a ``max_experts`` above the sizes of all layers, which limits nothing."""
        if (getattr(self, "max_experts", None) or 0) > max(sizes):
            return dataclasses.replace(self, max_experts=None)  # type: ignore[call-arg]
        return self

    def check_tokens(self, per_pass: int, per_step: int) -> None:
        """Raises a ConfigError if there are too few tokens in a forward pass over all ranks, or in a step."""

    @property
    def selects_among(self) -> str:
        """``SELECTS_AMONG``, unless it depends on a field."""
        return self.SELECTS_AMONG

    @property
    def num_zero_computation(self) -> int:
        """Number of experts that a token can select besides those of the layer, and that compute (almost) nothing."""
        return 0

    # Tensors

    def parameters(self, hidden: int, num_experts: int) -> dict[str, TensorSpec]:
        """The trained tensors by name, with a shape suffix."""
        raise NotImplementedError

    def buffers(self, hidden: int, num_experts: int) -> dict[str, TensorSpec]:
        """The tensors that are updated outside autograd, by name; fp32 in every model, and part of checkpoints."""
        return {}

    def stored_buffers(self, hidden: int, num_experts: int) -> dict[str, TensorSpec]:
        """The buffers as a model stores them: with several budgets, one for each where it depends on the budget."""
        own = self.buffers(hidden, num_experts)
        if not self.budgets:
            return own
        count = len(self.budgets)
        rows = {name: dataclasses.replace(t, shape=(count, *t.shape)) for name, t in own.items() if t.by_budget}
        return own | rows

    # Losses

    @property
    def losses(self) -> dict[str, LossFunction]:
        """The auxiliary losses with a positive coefficient, in the order of their fields."""
        resolved = self.resolved
        return {
            field.name.removesuffix("_loss"): field.metadata["loss"]
            for field in dataclasses.fields(self)
            if "loss" in field.metadata and getattr(resolved, field.name) > 0
        }

    def loss_coefficients(self, state: RouterState | None = None) -> dict[str, Any]:
        """The coefficient of each active loss; without ``state``, only those that are configured."""
        resolved = self.resolved
        return {name: getattr(resolved, f"{name}_loss") for name in self.losses if self.has_field(f"{name}_loss")}

    # Computation; ``self`` is resolved

    def plan(self, state: RouterState, x_TD: Tensor, selected_TE: Tensor | None = None) -> RoutingPlan:
        """The plan of these tokens with scaled gates, as a layer uses it.

        ``selected_TE`` (bool) replaces the router's own selection.
        """
        plan = self.route(state, x_TD)
        if selected_TE is not None:
            plan = self.reroute(plan, selected_TE)
        if self.gate_scale == 1.0:
            return plan
        return dataclasses.replace(plan, gates_TE=self.gate_scale * plan.gates_TE)

    def route(self, state: RouterState, x_TD: Tensor) -> RoutingPlan:
        """The plan of these tokens, before the gates are scaled."""
        raise NotImplementedError

    def reroute(self, plan: RoutingPlan, selected_TE: Tensor) -> RoutingPlan:
        """The plan of the same tokens with the experts of ``selected_TE`` (bool), for ``train.replay``.

        Gates are computed as in :meth:`route`. By default they are the scores, renormalized if the router does so.
        With the router's own selection the result equals ``plan``, values and gradients.
        """
        from dynmoe.routing.selection import with_experts

        return with_experts(plan, selected_TE, bool(getattr(self, "renormalize", False)))

    def control_value(self, state: RouterState) -> Tensor:
        """The scalar that determines K: k, p, the L1 coefficient or the mean threshold."""
        raise NotImplementedError

    def compared_TE(self, state: RouterState, plan: RoutingPlan) -> Tensor:
        """The values that were compared with thresholds, if the router ``NEEDS_DEVIATION``."""
        raise NotImplementedError

    def histogram_EC(self, state: RouterState, plan: RoutingPlan) -> Tensor:
        """Counts of this rank's tokens by expert and bin, int64, if the router ``NEEDS_HISTOGRAM``."""
        raise NotImplementedError

    def calibration_TE(self, state: RouterState, x_TD: Tensor) -> Tensor:
        """The values to which calibration fits ``offset_E``."""
        raise NotImplementedError

    def update(self, state: RouterState, seen: UpdateStatistics, budget: BudgetStep) -> None:
        """Updates the buffers after a step with statistics ``seen``, towards the target of the budget."""

    def new_expert(
        self, state: RouterState, slot: int, active_E: Tensor, at_median: bool
    ) -> dict[str, tuple[tuple[int | slice, ...], Tensor]]:
        """Initial values for the expert in ``slot``, if the router ``ADAPTS``: index and value for each parameter.

        Args:
            state: its window determines the tokens for which the expert is added.
            slot: index of the expert.
            active_E: mask of the active experts without the new one.
            at_median: start at the median of the current thresholds instead of 0.
        """
        raise NotImplementedError

    # Exports and warm starts

    @property
    def served_fields(self) -> tuple[str, ...]:
        """Fields that can be overridden when an export is served."""
        return tuple(field.name for field in dataclasses.fields(self) if field.metadata.get("served"))

    def upcycling_fields(self, granularity: int) -> dict[str, Any]:
        """Fields with which ``granularity`` slices of a dense layer together compute the same as the layer."""
        wanted = {"renormalize": True, "min_experts": granularity}
        return {name: value for name, value in wanted.items() if self.has_field(name)}


ROUTERS: dict[str, type[RouterSpec]] = {}


def router_of(settings: Mapping[str, Any]) -> RouterSpec:
    """The router with these settings, by ``kind``; ignores settings that it does not have.

    Raises:
        ConfigError: the kind is unknown, or a setting is out of range.
    """
    kind = settings["kind"]
    if kind not in ROUTERS:
        raise ConfigError("router.kind", kind, "is not known", f"use one of {', '.join(ROUTERS)}")
    spec = ROUTERS[kind]
    return spec(**{name: value for name, value in settings.items() if spec.has_field(name)})


_Spec = TypeVar("_Spec", bound=RouterSpec)


@dataclass_transform()
def register(kind: str) -> Callable[[type[_Spec]], type[_Spec]]:
    """Makes a router a dataclass and registers it as ``model.router.kind``.

    Raises:
        TypeError: the router lacks a method that every router needs.
    """

    def enter(spec: type[_Spec]) -> type[_Spec]:
        for name in ("parameters", "route", "control_value"):
            if getattr(spec, name) is getattr(RouterSpec, name):
                raise TypeError(f"{spec.__name__} does not define {name}, which every router needs")
        spec.__annotations__["kind"] = "str"
        spec.kind = option(kind, RouterSpec.__dataclass_fields__["kind"].metadata["meaning"])
        ROUTERS[kind] = dataclass(spec)
        return spec

    return enter
