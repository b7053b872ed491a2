"""The optimizer and its parameter groups, one for each role of a weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from dynmoe.config import Config
from dynmoe.config.sections import OptimizerConfig
from dynmoe.moe.router import Router
from dynmoe.train.muon import MuonAdamW


def parameter_groups(module: nn.Module, config: Config) -> list[dict[str, Any]]:
    """Parameter groups ``decay`` (matrices), ``no_decay`` (norms), ``router`` and ``router_no_decay`` (thresholds).

    With Muon, ``muon`` has the matrices of the decoder layers, and ``decay`` embedding and output projection. Each has
    a ``name``, a ``weight_decay``, a factor ``lr_factor`` of the scheduled learning rate, and whether it is updated by
    Muon (``muon``). Expert parameters are marked by ``allreduce = False``, by which engines split the groups further.
    """
    router = {id(p) for m in module.modules() if isinstance(m, Router) for p in m.parameters()}
    decay = config.optimizer.weight_decay
    factor = config.model.router.lr_factor
    groups: dict[str, dict[str, Any]] = {
        "decay": {"weight_decay": decay, "lr_factor": 1.0},
        "muon": {"weight_decay": decay, "lr_factor": 1.0},
        "no_decay": {"weight_decay": 0.0, "lr_factor": 1.0},
        "router": {"weight_decay": decay, "lr_factor": factor},
        "router_no_decay": {"weight_decay": 0.0, "lr_factor": factor},
    }
    for path, parameter in module.named_parameters():
        name = "router" if id(parameter) in router else ""
        if parameter.dim() < 2:
            name = f"{name}_no_decay" if name else "no_decay"
        elif not name and config.optimizer.kind == "muon" and ".layers." in f".{path}":
            name = "muon"
        groups[name or "decay"].setdefault("params", []).append(parameter)
    return [group | {"name": name, "muon": name == "muon"} for name, group in groups.items() if "params" in group]


def make_optimizer(groups: Sequence[dict[str, Any]], config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW, or Muon with AdamW, over parameter groups of :func:`parameter_groups`."""
    options: dict[str, Any] = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps, "fused": True}
    if config.kind == "muon":
        return MuonAdamW(groups, config.muon_momentum, **options)
    return torch.optim.AdamW(groups, **options)
