"""A stand-in for SonicMoE's package on any device: its function by plain PyTorch, which insists on what it requires.

Signature and requirements are those of sonic-moe 0.1.2: routes sorted by token, int32; fp32 scores; w1 [2I, H, E] and
w2 [H, I, E], each a view in which an expert's matrix lies in one piece; rows that begin at 16 bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from types import ModuleType
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from dynmoe.ops import pick_backend


class ActivationType(Enum):
    SWIGLU = "swiglu"


def moe_general_routing_inputs(
    x: Tensor, router_scores: Tensor, token_indices: Tensor, expert_indices: Tensor, w1: Tensor, b1: Tensor | None,
    w2: Tensor, b2: Tensor | None, E: int, stream_id: int, activation_type: ActivationType,
    is_inference_mode_enabled: bool = False, concat_layout: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Returns the scored sum over the experts of each token, and the number of routes of each expert."""
    assert b1 is None
    assert b2 is None
    assert isinstance(stream_id, int)
    assert activation_type is ActivationType.SWIGLU
    assert x.is_contiguous()
    assert router_scores.dtype == torch.float32
    assert router_scores.shape == token_indices.shape == expert_indices.shape
    assert len(token_indices) > 0
    assert token_indices.dtype == expert_indices.dtype == torch.int32
    assert (token_indices.diff() >= 0).all()
    for w in (w1, w2):
        rows, columns, _ = w.shape
        assert w.stride() == (columns, 1, rows * columns)
    assert w1.shape[2] == w2.shape[2] == E
    assert w1.shape[0] == 2 * w2.shape[1]
    assert x.shape[1] % 8 == w2.shape[1] % 8 == 0
    y = torch.zeros_like(x)
    for expert in range(E):
        route = (expert_indices == expert).nonzero().squeeze(1)
        token = token_indices[route].long()
        h = x[token] @ w1[:, :, expert].t()
        gate, up = h.chunk(2, dim=1) if concat_layout else (h[:, ::2], h[:, 1::2])
        out = F.silu(gate) * up @ w2[:, :, expert].t()
        y = y.index_add(0, token, (out * router_scores[route, None]).to(y.dtype))
    if y.requires_grad:
        y.register_hook(_insist_on_strides)
    return y, torch.bincount(expert_indices, minlength=E).to(torch.int32)


def _insist_on_strides(grad: Tensor) -> None:
    assert grad.is_contiguous()


def stand_in() -> ModuleType:
    """The package, as far as our backend uses it."""
    package = ModuleType("sonicmoe")
    package.moe_general_routing_inputs = moe_general_routing_inputs  # type: ignore[attr-defined]
    package.enums = ModuleType("sonicmoe.enums")  # type: ignore[attr-defined]
    package.enums.ActivationType = ActivationType  # type: ignore[attr-defined]
    return package


@contextmanager
def sonic_anywhere() -> Iterator[None]:
    """``pick_backend("sonic", ...)`` gives our backend over the stand-in, whatever the device and dtype."""
    pick_backend.cache_clear()
    try:
        with mock.patch("dynmoe.ops.routed_experts.load_sonic", return_value=stand_in()):
            yield
    finally:
        pick_backend.cache_clear()
