"""The field ``router`` of an exported config.json: settings of the routers, and the budget of the run."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from math import isfinite
from typing import Any

import torch

from dynmoe.config import Config
from dynmoe.config.budget import BudgetConfig
from dynmoe.errors import UserError
from dynmoe.hf.fields import RESTORE, Settings, shown
from dynmoe.model import Decoder
from dynmoe.routers import ROUTERS, RouterSpec

_BUDGET = ("method", "experts_per_token", "scope", "proportional", "integral", "rate")
# Training settings that older exports may lack; a new run then starts with our defaults.
_NOT_IN_OLDER = {
    "variant", "lr_factor", "balance_scope", "p", "cutoff", "cutoff_decay", "initial_experts", "temperature", "scale",
    "l1_start",
}  # fmt: skip


# Fields that older exports lack, with the only value that they could have.
_ADDED: dict[str, Any] = {
    "budgets": [], "gate_scale": 1.0, "n_group": 1, "topk_group": 1, "score_function": "softmax",
}  # fmt: skip


def write_router(config: Config) -> dict[str, Any]:
    """Every field of a run's router with its effective value, and the budget at the end of its schedule."""
    settings = dataclasses.asdict(config.model.router.resolved)
    budget = config.budget
    if budget.method != "none" or budget.experts_per_token is not None:
        settings["budget"] = {name: getattr(budget, name) for name in _BUDGET}
    return settings


def read_router(found: Any, hidden: int) -> dict[str, Any]:
    """The fields of our configuration that :func:`write_router` wrote, except those equal to the variant's value.

    Args:
        found: the field ``router``.
        hidden: the model dimension.

    Raises:
        UserError: a setting is missing or unknown.
    """
    found = dict(_mapping("router", found))
    kind = Settings(found, path="router.")["kind"]
    if kind not in list(ROUTERS):
        raise UserError(f"config.json: router.kind={shown(kind)}: unknown router; use one of {', '.join(ROUTERS)}")
    spec = ROUTERS[kind]
    found = {name: value for name, value in _ADDED.items() if spec.has_field(name)} | found
    if "form" in found:
        found = _from_older(spec, found, hidden)
    fields = [field.name for field in dataclasses.fields(spec)]
    state = [name for name, tensor in spec().buffers(hidden, 1).items() if tensor.export == "config"]
    _check_known("router", found, (*fields, *state, "budget"))
    get = Settings(found, path="router.")
    given = {name: get.optional(name) for name in fields}
    usual = dataclasses.asdict(spec(variant=given["variant"]).resolved)
    named = {"model.router.kind": kind, "model.router.variant": given["variant"]}
    named |= {f"model.router.{name}": value for name, value in given.items() if value != usual[name]}
    budget = found.get("budget")
    if budget is not None:
        _check_known("router.budget", _mapping("router.budget", budget), _BUDGET)
        named |= {f"budget.{name}": value for name, value in budget.items() if value != getattr(BudgetConfig(), name)}
    return named


def _from_older(spec: type[RouterSpec], found: Mapping[str, Any], hidden: int) -> dict[str, Any]:
    """Converts settings of an older version to the current format.

    Older versions named the variant ``form``, stored losses in a separate mapping, and stored in ``scale`` the whole
    factor on cosines, or null if it is trained.
    """
    get = Settings(found, path="router.")
    losses = _mapping("router.losses", get["losses"])
    names = [field.name for field in dataclasses.fields(spec)]
    known = {name.removesuffix("_loss") for name in names if name.endswith("_loss")}
    # Older versions listed every loss for every router.
    _check_known("router.losses", losses, {*known, *(name for name, value in losses.items() if value == 0)})
    ordinary = spec(variant=get["form"]).resolved
    # Older versions wrote these two fields for every router.
    elsewhere = {"form", "losses", "scale", *({"renormalize", "balance_per_route"} - set(names))}
    today = {name: value for name, value in found.items() if name not in elsewhere}
    today["variant"] = found["form"]
    today |= {f"{name}_loss": losses.get(name, 0.0) for name in known}
    today |= {name: getattr(ordinary, name) for name in _NOT_IN_OLDER & set(names) if name not in today}
    if today.get("weights") == "uniform":  # whose gates sum to 1 whatever it says
        today["renormalize"] = None
    if "temperature" in names:
        scale = get.optional("scale")
        factor = {"fixed": 1.0, "sqrt_hidden": hidden**0.5}.get(today["temperature"])
        if scale is None:
            today["temperature"] = "learned"
        elif factor is None or scale != today["scale"] * factor:
            today |= {"temperature": "fixed", "scale": scale}
    return today


def router_state(decoder: Decoder) -> dict[str, Any]:
    """Router state that is stored in config.json: one number per MoE layer, by name."""
    if not decoder.moe_layers:
        return {}
    return {
        name: [float(layer.router.get_buffer(name)) for layer in decoder.moe_layers]
        for name in _state_in_config(decoder)
    }


def _state_in_config(decoder: Decoder) -> list[str]:
    spec = decoder.settings.router
    return [name for name, tensor in spec.buffers(decoder.settings.hidden, 1).items() if tensor.export == "config"]


@torch.no_grad()
def restore_router_state(decoder: Decoder, found: Mapping[str, Any]) -> None:
    """Restores router state that is not in tensors, after the tensors have been loaded.

    Marks thresholds as calibrated, so that the first scores do not reset them, and reads the state that ``found`` (the
    field ``router``) contains.

    Raises:
        UserError: a state is not one positive number per MoE layer.
    """
    for layer in decoder.moe_layers:
        if layer.router.is_calibrated is not None:
            layer.router.is_calibrated.fill_(True)
    for name in _state_in_config(decoder) if decoder.moe_layers else ():
        if name not in found:
            continue
        values = found[name]
        layers = decoder.moe_layers
        if not (isinstance(values, list) and len(values) == len(layers) and all(map(_is_positive, values))):
            problem = f"must be {len(layers)} positive numbers, one per MoE layer"
            raise UserError(f"config.json: router.{name}={shown(values)}: {problem}; {RESTORE}")
        for layer, value in zip(layers, values, strict=True):
            layer.router.get_buffer(name).fill_(value)


def _is_positive(value: Any) -> bool:
    return isinstance(value, float) and isfinite(value) and value > 0


def _mapping(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise UserError(f"config.json: {name}={shown(value)}: must be a mapping; {RESTORE}")
    return value


def _check_known(path: str, found: Mapping[str, Any], known: Collection[str]) -> None:
    for name, value in found.items():
        if name not in known and value is not None:
            cure = "remove it if the modeling code next to the weights works without it"
            raise UserError(f"config.json: {path}.{name}={shown(value)}: unknown to this version; {cure}")
