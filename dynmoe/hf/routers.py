"""The field ``router`` of an export's config.json: what our modeling code reads, and what only training asks for."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict
from math import isfinite
from typing import Any

import torch

from dynmoe.config import Config
from dynmoe.config.control import BudgetConfig
from dynmoe.config.routing import RouterConfig
from dynmoe.errors import UserError
from dynmoe.hf.fields import RESTORE, Settings, shown
from dynmoe.model import Decoder
from dynmoe.moe.routers import ReLURouter, ThresholdRouter

# Fields of ours without which there are no logits or losses: of all kinds, and of each.
_OF_ALL = ("renormalize", "balance_per_route")
_OF_KIND: dict[str, tuple[str, ...]] = {
    "top_k": ("k",),
    "top_p": ("min_experts", "max_experts"),
    "top_any": ("min_experts", "max_experts", "weights", "straight_through"),
    "sigmoid": ("min_experts", "max_experts", "cutoff"),
    "expert_threshold": (),
    "relu": ("max_experts",),
    "null_experts": ("k", "num_null"),
}
# Fields of trainings, which older exports lack: a run that begins with one has our defaults.
_OF_TRAINING = ("balance_scope", "lr_factor")
_OF_TRAINING_OF_KIND = {"top_p": ("p",), "expert_threshold": ("cutoff", "cutoff_decay")}
_BUDGET = ("method", "experts_per_token", "scope", "proportional", "integral", "rate")
_LOSSES = ("balance", "entropy", "z", "diversity", "simplicity", "efficiency")


def write_router(config: Config) -> dict[str, Any]:
    """The settings of a run's routers; ``scale`` is the factor on cosines, None where it is trained.

    Of a budget that is what its schedule leads to.
    """
    router, budget = config.model.router, config.budget
    settings: dict[str, Any] = {"kind": router.kind, "form": router.form}
    values = _values(router)
    settings |= {name: values[name] for name in (*_OF_ALL, *_OF_KIND[router.kind], *_of_training(router.kind))}
    if router.kind == "top_any":
        settings["scale"] = _scale(router, config.model.hidden)
    settings["losses"] = router.loss_coefficients
    if budget.method != "none" or budget.experts_per_token is not None:
        settings["budget"] = {name: getattr(budget, name) for name in _BUDGET}
    return settings


def read_router(found: Any, hidden: int) -> dict[str, Any]:
    """The fields of our configuration that :func:`write_router` made ``found`` of, but for what a form has anyway.

    Args:
        found: the field ``router``.
        hidden: the model dimension.

    Raises:
        UserError: a setting that is missing, or is not known here, by name.
    """
    get = Settings(_mapping("router", found), path="router.")
    kind, losses, budget = get["kind"], _mapping("router.losses", get["losses"]), found.get("budget")
    if kind not in list(_OF_KIND):
        raise UserError(f"config.json: router.kind={shown(kind)} is not known here; known are {', '.join(_OF_KIND)}")
    special = {"top_any": ("scale",), "relu": ("l1",)}.get(kind, ())
    needed, of_training = (*_OF_ALL, *_OF_KIND[kind]), _of_training(kind)
    _check_known("router", found, ("kind", "form", "losses", "budget", *needed, *of_training, *special))
    _check_known("router.losses", losses, _LOSSES)
    ordinary = RouterConfig(kind=kind, form=get["form"])
    values = {name: get.optional(name) for name in needed}
    values |= {name: found[name] for name in of_training if name in found}
    if kind == "top_any" and get.optional("scale") != _scale(ordinary, hidden):
        learned = get.optional("scale") is None
        values |= {"temperature": "learned"} if learned else {"temperature": "fixed", "scale": get["scale"]}
    values |= {f"{name}_loss": losses.get(name, 0.0) for name in _LOSSES}
    usual = _values(ordinary) | {f"{name}_loss": ordinary.loss_coefficients.get(name, 0.0) for name in _LOSSES}
    fields = {"model.router.kind": kind, "model.router.form": ordinary.form}
    fields |= {f"model.router.{name}": value for name, value in values.items() if value != usual[name]}
    if budget is not None:
        _check_known("router.budget", _mapping("router.budget", budget), _BUDGET)
        fields |= {f"budget.{name}": value for name, value in budget.items() if value != getattr(BudgetConfig(), name)}
    return fields


def router_state(decoder: Decoder) -> dict[str, Any]:
    """State that no tensor of an export holds: coefficients of the ReLU routers' penalty, by MoE layer."""
    coefficients = [float(layer.router.l1) for layer in decoder.moe_layers if isinstance(layer.router, ReLURouter)]
    return {"l1": coefficients} if coefficients else {}


@torch.no_grad()
def settle(decoder: Decoder, found: Mapping[str, Any]) -> None:
    """Makes routers that have their tensors those of a training under way.

    Thresholds stay as they are, in place of being set by first scores; the penalty of ReLU routers too, where
    ``found`` (the field ``router``) says it.

    Raises:
        UserError: it is not one positive number for each MoE layer.
    """
    for layer in decoder.moe_layers:
        if isinstance(layer.router, ThresholdRouter):
            layer.router.calibrated.fill_(True)
    penalized = [layer.router for layer in decoder.moe_layers if isinstance(layer.router, ReLURouter)]
    if not penalized or "l1" not in found:
        return
    values = found["l1"]
    if not (isinstance(values, list) and len(values) == len(penalized) and all(map(_is_positive, values))):
        problem = f"router.l1={shown(values)} is not a positive number for each of {len(penalized)} layers"
        raise UserError(f"config.json: {problem}; {RESTORE}")
    for router, value in zip(penalized, values, strict=True):
        router.l1.fill_(value)


def _is_positive(value: Any) -> bool:
    return isinstance(value, float) and isfinite(value) and value > 0


def _values(router: RouterConfig) -> dict[str, Any]:
    """Every field, with the choices in force where a form has some."""
    return asdict(router) | asdict(router.options)


def _of_training(kind: str) -> tuple[str, ...]:
    return (*_OF_TRAINING, *_OF_TRAINING_OF_KIND.get(kind, ()))


def _scale(router: RouterConfig, hidden: int) -> float | None:
    factor = {"fixed": 1.0, "sqrt_hidden": hidden**0.5}.get(router.options.temperature)
    return None if factor is None else router.scale * factor


def _mapping(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise UserError(f"config.json: {name}={shown(value)} is no mapping; {RESTORE}")
    return value


def _check_known(path: str, found: Mapping[str, Any], known: Collection[str]) -> None:
    for name, value in found.items():
        if name not in known and value is not None:
            cure = "remove it, if the modeling code beside the weights does without"
            raise UserError(f"config.json: {path}.{name}={shown(value)}: what it does is not known here; {cure}")
