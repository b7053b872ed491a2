"""Configuration of what acts between optimizer steps: the budget of experts per token, experts that come and go."""

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
        "none", "how experts per token are held: pi moves p (top_p) or all thresholds together; loss_free also each "
        "expert's threshold by its load (top_k: its bias, for balance alone)", choices=("none", "pi", "loss_free"),
    )  # fmt: skip
    experts_per_token: Optional[float] = option(None, "mean experts per token to hold", above=0)
    start: Optional[float] = option(None, "experts per token to hold at first; null: experts_per_token", above=0)
    over_steps: int = option(0, "steps in which the target goes from start to experts_per_token", at_least=0)
    scope: str = option("layer", "hold each layer, or the mean over layers", choices=("layer", "global"))
    proportional: float = option(0.1, "gain on the change of the error 1 - observed / target", at_least=0)
    integral: float = option(0.4, "gain on the error, per step", above=0)
    rate: Optional[float] = option(
        None, "loss_free: step of a threshold in deviations of its scores (null: 0.1), or of a bias (null: 0.001)",
        above=0,
    )  # fmt: skip

    def check_router(self, router: RouterSpec, num_experts: int) -> None:
        """Raises a ConfigError where this budget cannot be held by ``router`` over ``num_experts`` active experts."""
        known = ("none", *router.BUDGET_METHODS)
        if self.method not in known:
            problem = f"the {router.kind} router has nothing that this could move"
            raise ConfigError("budget.method", self.method, problem, f"use {' or '.join(known)}")
        needs = router.HAS_OWN_RULE or (self.method != "none" and router.fixed_experts is None)
        if needs and self.experts_per_token is None:
            raise ConfigError("budget.experts_per_token", None, "is needed to hold a budget", "say how many")
        if not needs and self.experts_per_token is not None:
            problem = f"nothing holds it: the {router.kind} router with budget.method={self.method}"
            raise ConfigError("budget.experts_per_token", self.experts_per_token, problem, "set budget.method")
        if (self.start is None) != (self.over_steps == 0):
            name, cure = ("start", "set budget.over_steps") if self.start else ("over_steps", "set budget.start")
            raise ConfigError(f"budget.{name}", getattr(self, name), "is half of a schedule", cure)
        if self.start is not None and self.experts_per_token is None:
            raise ConfigError("budget.start", self.start, "has no target to lead to", "set budget.experts_per_token")
        if self.rate is not None and self.method != "loss_free":
            raise ConfigError("budget.rate", self.rate, f"has no meaning for budget.method={self.method}", "remove it")
        if self.scope == "global" and not router.HOLDS_GLOBALLY:
            problem = f"the {router.kind} router holds each layer by itself"
            raise ConfigError("budget.scope", self.scope, problem, "use layer")
        fewest = router.min_experts_per_token
        most = router.max_experts_per_token(num_experts)
        for name in ("experts_per_token", "start"):
            value = getattr(self, name)
            if value is not None and not fewest <= value <= most:
                problem = f"is outside what a token may use ({fewest} to {most})"
                raise ConfigError(f"budget.{name}", value, problem, "change it or the limits")


@dataclass
class AdaptationConfig(Section):
    _section: ClassVar[str] = "adaptation"

    interval: int = option(0, "top_any: steps between updates of the set of experts (0: it stays)", at_least=0)
    window: int = option(1, "steps before each update in which the routing is recorded", at_least=1)
    until: Optional[int] = option(None, "last step that may update; null: the whole run", at_least=1)
    policy: str = option(
        "improved", "released: the first free slot and a threshold of 0; improved: a slot on the rank with the fewest "
        "active experts, the median threshold, and the shares below", choices=("improved", "released"),
    )  # fmt: skip
    removal_share: float = option(
        0.0, "improved: remove experts with at most this share of the mean load (0: never selected)",
        at_least=0, below=1,
    )  # fmt: skip
    addition_share: float = option(
        0.0, "improved: add an expert where more than this share of tokens passed no threshold", at_least=0, below=1
    )

    def check_run(self, router: RouterSpec, steps: int) -> None:
        """Raises a ConfigError where the experts of ``router`` cannot be adapted in a run of ``steps`` steps."""
        if self.interval == 0:
            return
        if not router.ADAPTS:
            problem = f"the {router.kind} router has no tokens that ask for another expert"
            raise ConfigError("adaptation.interval", self.interval, problem, "use 0, or model.router.kind=top_any")
        if self.window > min(self.interval, steps):
            problem = f"is longer than the interval ({self.interval}) or the run ({steps} steps)"
            raise ConfigError("adaptation.window", self.window, problem, "use a shorter one")
        last = min(self.until or steps, steps)
        if self.interval > last:
            problem = f"ends no window before the last step that may update ({last})"
            raise ConfigError("adaptation.interval", self.interval, problem, "use a shorter one, or 0")
        if self.policy == "released" and (self.removal_share or self.addition_share):
            name = "removal_share" if self.removal_share else "addition_share"
            problem = "the released policy counts any or none"
            raise ConfigError(f"adaptation.{name}", getattr(self, name), problem, "use 0, or policy=improved")
