"""Configuration of routers and experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Optional

from dynmoe.config.fields import Section, check_multiple_of_8, option
from dynmoe.errors import ConfigError


@dataclass(frozen=True)
class RouterKind:
    """What is known of a kind of router before anything heavy is loaded.

    Attributes:
        fields: of RouterConfig, that mean something to it beside those that belong to all.
        methods: of BudgetConfig, that can hold it.
        own_rule: it holds a budget by a rule of its own.
    """

    fields: tuple[str, ...]
    methods: tuple[str, ...] = ()
    own_rule: bool = False


_LIMITS = ("min_experts", "max_experts")
_BALANCE = ("balance_loss", "balance_per_route")
KINDS = {
    "top_k": RouterKind(("renormalize", *_BALANCE, "entropy_loss", "z_loss"), ("loss_free",)),
    "top_p": RouterKind(("renormalize", *_LIMITS, *_BALANCE, "entropy_loss", "z_loss"), ("pi",)),
    "top_any": RouterKind(
        ("renormalize", *_LIMITS, *_BALANCE, "initial_experts", "weights", "straight_through", "temperature", "scale",
         "diversity_loss", "simplicity_loss", "efficiency_loss"),
        ("pi", "loss_free"),
    ),
    "sigmoid": RouterKind(("renormalize", *_LIMITS, *_BALANCE, "initial_experts", "cutoff"), ("pi", "loss_free")),
    "expert_threshold": RouterKind(
        ("renormalize", *_BALANCE, "initial_experts", "cutoff", "cutoff_decay"), own_rule=True
    ),
    "relu": RouterKind(("max_experts", "l1_start"), own_rule=True),
    "null_experts": RouterKind(("renormalize", "balance_loss", "num_null", "z_loss")),
}  # fmt: skip
# k and p belong to all: whoever compares routers changes the kind alone.
_SPECIAL_FIELDS = {name for kind in KINDS.values() for name in kind.fields}


@dataclass(frozen=True)
class RouterOptions:
    """What a form decides unless the configuration does: see the fields of the same names in RouterConfig."""

    weights: str = "uniform"
    renormalize: bool = False
    straight_through: str = "all"
    temperature: str = "fixed"
    min_experts: int = 1
    initial_experts: float | None = None
    balance_per_route: bool = False


# What differs from the defaults of RouterOptions.
_OPTIONS: dict[tuple[str, str], dict[str, Any]] = {
    ("top_k", "paper"): {"balance_per_route": True},
    ("top_p", "improved"): {"balance_per_route": True},
    ("top_any", "released"): {"straight_through": "selected", "min_experts": 0},
    ("top_any", "improved"): {
        "weights": "score", "renormalize": True, "temperature": "sqrt_hidden", "initial_experts": 2.0,
    },
    ("expert_threshold", "paper"): {"min_experts": 0, "initial_experts": 2.0},
    ("relu", "paper"): {"min_experts": 0},
    ("null_experts", "paper"): {"renormalize": True},
}  # fmt: skip

# arXiv 2403.07652, section 3.3 (alpha, beta); the switch loss for top_k; arXiv 2405.14297 for top_any, whose released
# code since January 2025 adds the last two. Routers that are not here have none.
_COEFFICIENTS: dict[tuple[str, str], dict[str, float]] = {
    ("top_k", "paper"): {"balance": 1e-2},
    ("null_experts", "paper"): {"balance": 1e-2},
    ("top_p", "paper"): {"balance": 1e-2, "entropy": 1e-4},
    ("top_p", "released"): {"balance": 1e-2, "entropy": 1e-4},
    ("top_p", "improved"): {"balance": 1e-2, "entropy": 1e-4},
    ("top_any", "paper"): {"diversity": 1e-2, "simplicity": 1e-2},
    ("top_any", "released"): {"diversity": 1e-2, "simplicity": 1e-2, "balance": 1e-2, "efficiency": 1e-2},
    ("top_any", "improved"): {"diversity": 1e-2, "simplicity": 1e-2, "balance": 1e-2},
}


@dataclass
class RouterConfig(Section):
    _section: ClassVar[str] = "model.router"

    kind: str = option("top_p", "how experts are chosen for a token", choices=tuple(KINDS))
    form: str = option(
        "paper", "top_p, top_any: the paper's definition, what its code does, or the paper's with our defaults",
        choices=("paper", "released", "improved"),
    )  # fmt: skip
    k: int = option(2, "top_k: experts per token; null_experts: slots per token, null ones included", at_least=1)
    p: float = option(0.4, "top_p: probability mass that the chosen experts reach", above=0, at_most=1)
    cutoff: float = option(0.5, "score that an expert must exceed (expert_threshold: at the start)", above=0, below=1)
    num_null: int = option(16, "null_experts: experts that do nothing", at_least=1)
    cutoff_decay: float = option(0.9, "expert_threshold: decay of the moving average", at_least=0, below=1)
    min_experts: Optional[int] = option(
        None, "floor of experts per token (0: a token may use none); null: by the form", at_least=0
    )
    max_experts: Optional[int] = option(None, "ceiling of experts per token", at_least=1)
    initial_experts: Optional[float] = option(
        None, "threshold routers: experts per token at the start, by thresholds from the first scores", above=0
    )
    weights: Optional[str] = option(
        None, "top_any: gates 1/K or the scores; null: by the form", choices=("uniform", "score")
    )
    renormalize: Optional[bool] = option(None, "make the gates of a token sum to 1; null: by the form")
    straight_through: Optional[str] = option(
        None, "top_any: experts whose step passes a gradient; null: by the form", choices=("all", "selected")
    )
    temperature: Optional[str] = option(
        None, "top_any: factor on cosines is scale, scale * sqrt(model.hidden), or that and trained; null: by the form",
        choices=("fixed", "sqrt_hidden", "learned"),
    )  # fmt: skip
    scale: float = option(1.0, "top_any: see temperature", above=0)
    balance_loss: Optional[float] = option(None, "coefficient of the load-balancing loss", at_least=0)
    balance_per_route: Optional[bool] = option(
        None, "divide the load-balancing loss by the observed experts per token; null: by the form"
    )
    balance_scope: str = option(
        "global_batch", "tokens whose load is balanced: of all ranks and micro-batches of the step so far, of one pass "
        "on one rank, or of each sequence", choices=("global_batch", "micro_batch", "sequence"),
    )  # fmt: skip
    entropy_loss: Optional[float] = option(None, "coefficient of the router entropy", at_least=0)
    z_loss: Optional[float] = option(None, "coefficient of the router z-loss", at_least=0)
    diversity_loss: Optional[float] = option(None, "top_any: coefficient of prototype diversity", at_least=0)
    simplicity_loss: Optional[float] = option(None, "top_any: coefficient of prototype norms", at_least=0)
    efficiency_loss: Optional[float] = option(None, "top_any: coefficient of the mean choice", at_least=0)
    l1_start: float = option(1e-8, "relu: coefficient of the L1 penalty at the start", above=0)
    lr_factor: float = option(1.0, "learning rate of router weights relative to optimizer.lr", above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        path = self._section
        if self.form != "paper" and self.kind not in ("top_p", "top_any"):
            raise ConfigError(f"{path}.form", self.form, f"the {self.kind} router has one form", "remove it")
        defaults = type(self).__dataclass_fields__
        for name in sorted(_SPECIAL_FIELDS - set(KINDS[self.kind].fields)):
            value = getattr(self, name)
            # A loss of 0 is what every router without that loss has.
            if value != defaults[name].default and value != 0:
                raise ConfigError(f"{path}.{name}", value, f"has no meaning for the {self.kind} router", "remove it")
        floor = self.options.min_experts
        if self.max_experts is not None and self.max_experts < floor:
            cure = f"use at least model.router.min_experts ({floor})"
            raise ConfigError(f"{path}.max_experts", self.max_experts, "is below the floor", cure)
        if self.kind == "top_p" and floor < 1:
            raise ConfigError(f"{path}.min_experts", floor, "top_p always selects one", "use 1 or more")
        if self.kind == "top_any" and self.form == "released" and floor:
            cure = "remove it, or use form=paper"
            raise ConfigError(f"{path}.min_experts", floor, "the released form has no floor", cure)
        if self.kind == "top_any" and self.options.weights == "uniform" and self.renormalize is False:
            cure = "remove it, or use weights=score"
            raise ConfigError(f"{path}.renormalize", False, "uniform gates always sum to 1", cure)
        if self.balance_scope == "sequence" and self.kind in ("top_any", "null_experts", "relu"):
            problem = f"the {self.kind} router balances over batches only"
            raise ConfigError(f"{path}.balance_scope", self.balance_scope, problem, "use global_batch or micro_batch")

    @property
    def options(self) -> RouterOptions:
        """The choices in force: the given ones, else those of the form."""
        form = _OPTIONS.get((self.kind, self.form), {})
        names = RouterOptions.__dataclass_fields__
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return RouterOptions(**{**form, **given})

    @property
    def loss_names(self) -> list[str]:
        """Auxiliary losses in force."""
        return [*self.loss_coefficients, *(["l1"] if self.kind == "relu" else [])]

    @property
    def loss_coefficients(self) -> dict[str, float]:
        """Coefficient of every auxiliary loss in force: the given one, else the one of the router's paper.

        That of the relu router's L1 penalty is a state of the router and not here.
        """
        names = ("balance", "entropy", "z", "diversity", "simplicity", "efficiency")
        defaults = _COEFFICIENTS.get((self.kind, self.form), {})
        given = {name: getattr(self, f"{name}_loss") for name in names}
        merged = {name: defaults.get(name, 0.0) if value is None else value for name, value in given.items()}
        return {name: value for name, value in merged.items() if value > 0}


@dataclass
class MoEConfig(Section):
    _section: ClassVar[str] = "model.moe"

    experts: int = option(16, "experts of one MoE layer (0: a dense model)", at_least=0)
    experts_by_layer: list[int] = option(
        [], "experts of each MoE layer, where they differ (after dynmoe.compact)", at_least=1
    )
    active_at_start: Optional[int] = option(
        None, "top_any: experts in use at the start; the other slots wait for adaptation. null: all", at_least=1
    )
    expert_hidden: int = option(512, "width of one SwiGLU expert", at_least=1)
    shared_hidden: int = option(0, "width of a shared expert that every token uses (0: none)", at_least=0)
    every: int = option(1, "an MoE layer in every n-th layer, the first included; dense SwiGLU elsewhere", at_least=1)
    capacity_factor: Optional[float] = option(
        None, "limit of routes per expert and rank in training, relative to perfect balance at the experts per token "
        "observed (a moving average); null: none", above=0,
    )  # fmt: skip
    drop_policy: str = option(
        "probs", "which routes to drop beyond capacity or ceiling: lowest score, or last position",
        choices=("probs", "position"),
    )  # fmt: skip
    ceiling: Optional[float] = option(
        None, "most experts per token in training, in the mean over the tokens of one rank and pass. Bounds the memory "
        "of a layer, which a GPU then takes whole in place of waiting for a count; with parallel.expert the routes "
        "that a rank sends, not those that it gets (see capacity_factor). null: none", at_least=1,
    )  # fmt: skip
    at_ceiling: str = option(
        "error", "what follows where tokens want more: the run ends, or every token's worst routes are dropped",
        choices=("error", "drop"),
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("expert_hidden", "shared_hidden"):
            check_multiple_of_8(f"model.moe.{name}", getattr(self, name))
        smallest = min(self.experts_by_layer or [self.experts])
        if self.active_at_start is not None and self.active_at_start > smallest:
            cure = f"use at most the number of experts ({smallest})"
            raise ConfigError("model.moe.active_at_start", self.active_at_start, "is more than there are", cure)
