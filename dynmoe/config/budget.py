"""Configuration of updates between optimizer steps: the budget of experts per token, and adaptation of the experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Optional

from dynmoe.errors import ConfigError
from dynmoe.fields import Section, option
from dynmoe.routers import RouterSpec


@dataclass
class BudgetConfig(Section):
    _section: ClassVar[str] = "budget"

    method: str = option(
        "none", "how the budget is enforced: pi moves p (top_p, dtop_p) or all thresholds together; loss_free also "
        "moves each expert's threshold or bias by its load (top_k: only to balance); quantile (top_k) sets each bias "
        "to the quantile that gives equal loads", choices=("none", "pi", "loss_free", "quantile"),
    )  # fmt: skip
    experts_per_token: Optional[float] = option(None, "target of the mean experts per token", above=0)
    start: Optional[float] = option(None, "initial target of a schedule; null: experts_per_token", above=0)
    over_steps: int = option(0, "steps over which the target moves from start to experts_per_token", at_least=0)
    scope: str = option("layer", "hold the target in each layer, or on average (global)", choices=("layer", "global"))
    proportional: float = option(0.1, "gain of pi on the change of the error (1 - observed / target)", at_least=0)
    integral: float = option(0.4, "gain of pi on the error, per step", above=0)
    rate: Optional[float] = option(
        None, "step size of loss_free: of a threshold in deviations of its scores (null: 0.1), of a bias of top_k "
        "(null: 0.001) or of identity_experts (null: 0.1); of quantile: share of the way to the new bias, at most 1 "
        "(null: 1)", above=0,
    )  # fmt: skip

    def check_router(self, router: RouterSpec, num_experts: int) -> None:
        """Raises a ConfigError if ``router`` cannot hold this budget with ``num_experts`` active experts."""
        known = ("none", *router.BUDGET_METHODS)
        if self.method not in known:
            problem = f"does not control the {router.kind} router"
            raise ConfigError("budget.method", self.method, problem, f"use {' or '.join(known)}")
        needs = router.HAS_OWN_RULE or bool(router.budgets)
        needs = needs or (self.method != "none" and router.fixed_experts is None)
        if needs and self.experts_per_token is None:
            by_itself = router.HAS_OWN_RULE and self.method == "none"
            what = "several model.router.budgets" if router.budgets else f"the {router.kind} router"
            problem = f"is needed by {what}" if router.budgets or by_itself else "is needed to hold a budget"
            raise ConfigError("budget.experts_per_token", None, problem, "set a number")
        if not needs and self.experts_per_token is not None:
            problem = f"the {router.kind} router does not hold it with budget.method={self.method}"
            raise ConfigError("budget.experts_per_token", self.experts_per_token, problem, "set budget.method")
        if (self.start is None) != (self.over_steps == 0):
            name, cure = ("start", "set budget.over_steps") if self.start else ("over_steps", "set budget.start")
            raise ConfigError(f"budget.{name}", getattr(self, name), "is only half of a schedule", cure)
        if self.start is not None and self.experts_per_token is None:
            raise ConfigError("budget.start", self.start, "has no final target", "set budget.experts_per_token")
        if router.budgets:
            self._check_several(router)
        if self.rate is not None and self.method not in ("loss_free", "quantile"):
            raise ConfigError("budget.rate", self.rate, f"has no meaning for budget.method={self.method}", "remove it")
        if self.method == "quantile":
            self._check_quantile(router)
        if self.scope == "global" and not router.HOLDS_GLOBALLY:
            problem = f"the {router.kind} router holds each layer separately"
            raise ConfigError("budget.scope", self.scope, problem, "use layer")
        fewest = router.min_experts_per_token
        most = router.max_experts_per_token(num_experts)
        for name in ("experts_per_token", "start"):
            value = getattr(self, name)
            if value is not None and not fewest <= value <= most:
                problem = f"is not a possible number of experts per token ({fewest} to {most})"
                raise ConfigError(f"budget.{name}", value, problem, "change it or the limits")
        if router.budgets and not (fewest <= router.budgets[0] and router.budgets[-1] <= most):
            problem = f"exceeds the possible experts per token ({fewest} to {most})"
            raise ConfigError("model.router.budgets", router.budgets, problem, "change it or the limits")

    def _check_quantile(self, router: RouterSpec) -> None:
        """Raises a ConfigError if ``router`` cannot be balanced by quantiles."""
        if self.rate is not None and self.rate > 1:
            raise ConfigError("budget.rate", self.rate, "would overshoot the quantile", "use at most 1")
        if router.n_group > 1:
            problem = f"gives experts shares of all tokens, of which model.router.n_group={router.n_group} bars some"
            raise ConfigError("budget.method", self.method, problem, "use loss_free")

    def _check_several(self, router: RouterSpec) -> None:
        """Raises a ConfigError if this budget does not fit the several budgets of the router."""
        if self.method == "none" and not (router.HAS_OWN_RULE or router.SETS_NUMBER):
            cure = f"use {' or '.join(router.BUDGET_METHODS)}"
            raise ConfigError("budget.method", self.method, "does not hold several model.router.budgets", cure)
        if self.start is not None:
            problem = "has no meaning with several model.router.budgets"
            raise ConfigError("budget.start", self.start, problem, "remove it")
        assert self.experts_per_token is not None
        router.check_budget(self.experts_per_token, "budget.experts_per_token")


@dataclass
class AdaptationConfig(Section):
    _section: ClassVar[str] = "adaptation"

    interval: int = option(0, "top_any: steps between updates of the set of experts (0: no updates)", at_least=0)
    window: int = option(1, "number of steps before each update in which routing is recorded", at_least=1)
    until: Optional[int] = option(None, "last step that may update the set; null: the last step of the run", at_least=1)
    policy: str = option(
        "improved", "how a new expert is placed: in the first free slot with a threshold of 0 (released), or in a slot "
        "on the rank with the fewest active experts with the median threshold (improved)",
        choices=("improved", "released"),
    )  # fmt: skip
    weights: str = option(
        "fresh", "weights of a new expert: fresh ones, or what its slot holds: those of its last expert or, in a model "
        "that was converted from a dense one, a copy of the dense layer", choices=("fresh", "slot"),
    )  # fmt: skip
    removal_share: float = option(
        0.0, "improved: remove experts with at most this share of the mean load (0: unused ones)", at_least=0, below=1
    )
    addition_share: float = option(
        0.0, "improved: add an expert if more than this share of tokens passes no threshold", at_least=0, below=1
    )

    def check_run(self, router: RouterSpec, steps: int) -> None:
        """Raises a ConfigError if the experts of ``router`` cannot be adapted in a run of ``steps`` steps."""
        if self.interval == 0:
            return
        if not router.ADAPTS:
            problem = f"the {router.kind} router cannot add or remove experts"
            raise ConfigError("adaptation.interval", self.interval, problem, "use 0, or model.router.kind=top_any")
        if router.budgets:
            problem = "cannot change the experts of a model with several model.router.budgets"
            raise ConfigError("adaptation.interval", self.interval, problem, "use 0, or budgets=[]")
        if self.window > min(self.interval, steps):
            problem = f"is longer than the interval ({self.interval}) or the run ({steps} steps)"
            raise ConfigError("adaptation.window", self.window, problem, "use a shorter one")
        last = min(self.until or steps, steps)
        if self.interval > last:
            problem = f"exceeds the last step that may update ({last})"
            raise ConfigError("adaptation.interval", self.interval, problem, "use a shorter one, or 0")
        if self.policy == "released" and (self.removal_share or self.addition_share):
            name = "removal_share" if self.removal_share else "addition_share"
            problem = "the released policy has no shares"
            raise ConfigError(f"adaptation.{name}", getattr(self, name), problem, "use 0, or policy=improved")
