"""Names of the tensors in a checkpoint: which parameter, which expert of it, and which part of its state.

``layers.0.norm.weight|param`` is the fp32 master of a dense parameter, ``layers.0.moe.experts.w_up_EHD.3|exp_avg`` a
moment of expert 3 of its layer, ``buffer|layers.0.moe.router.active_E`` a buffer.
"""

from __future__ import annotations

MASTER, MOMENTS = "param", ("exp_avg", "exp_avg_sq")
OPTIMIZER_STEP = "optimizer_step"


def parameter_key(name: str, part: str, expert: int | None = None) -> str:
    """Key of a parameter's master or moment; of one expert of it where ``expert`` is given."""
    return f"{name}|{part}" if expert is None else f"{name}.{expert}|{part}"


def split_expert(key: str) -> tuple[str, int, str]:
    """Parameter, expert and part of a key that :func:`parameter_key` made for an expert."""
    left, part = key.split("|")
    name, expert = left.rsplit(".", 1)
    return name, int(expert), part


def buffer_key(name: str) -> str:
    return f"buffer|{name}"
