"""Parameter groups for AdamW, one for each role of a weight."""

from __future__ import annotations

from typing import Any

from torch import nn

from dynmoe.config import Config
from dynmoe.moe.router import Router


def parameter_groups(module: nn.Module, config: Config) -> list[dict[str, Any]]:
    """Parameter groups ``decay`` (matrices), ``no_decay`` (norms), ``router`` and ``router_no_decay`` (thresholds).

    Each has a ``name``, a ``weight_decay`` and a factor ``lr_factor`` of the scheduled learning rate. Expert
    parameters are marked by ``allreduce = False``, by which engines split the groups further.
    """
    router = {id(p) for m in module.modules() if isinstance(m, Router) for p in m.parameters()}
    decay = config.optimizer.weight_decay
    factor = config.model.router.lr_factor
    groups: dict[str, dict[str, Any]] = {
        "decay": {"weight_decay": decay, "lr_factor": 1.0},
        "no_decay": {"weight_decay": 0.0, "lr_factor": 1.0},
        "router": {"weight_decay": decay, "lr_factor": factor},
        "router_no_decay": {"weight_decay": 0.0, "lr_factor": factor},
    }
    for parameter in module.parameters():
        name = "router" if id(parameter) in router else ""
        if parameter.dim() < 2:
            name = f"{name}_no_decay" if name else "no_decay"
        groups[name or "decay"].setdefault("params", []).append(parameter)
    return [group | {"name": name} for name, group in groups.items() if "params" in group]
