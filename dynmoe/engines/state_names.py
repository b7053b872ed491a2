"""Keys of the tensors in the canonical form of a checkpoint: parameter, expert and part of its state.

``layers.0.norm.weight|param`` is the fp32 master of a dense parameter, ``layers.0.moe.experts.w_up_EHD.3|exp_avg`` a
moment of expert 3, and ``buffer|layers.0.moe.router.active_E`` a buffer.
"""

from __future__ import annotations

MASTER = "param"
MOMENTS = ("exp_avg", "exp_avg_sq")
MOMENTS_OF_MUON = ("exp_avg",)
OPTIMIZER_STEP = "optimizer_step"


def parameter_key(name: str, part: str, expert: int | None = None) -> str:
    """Key of the master or a moment of a parameter, or of one of its experts."""
    return f"{name}|{part}" if expert is None else f"{name}.{expert}|{part}"


def split_expert(key: str) -> tuple[str, int, str]:
    """Splits a key of an expert from :func:`parameter_key` into parameter, expert and part."""
    left, part = key.split("|")
    name, expert = left.rsplit(".", 1)
    return name, int(expert), part


def buffer_key(name: str) -> str:
    return f"buffer|{name}"
