"""Routed experts by SonicMoE (package ``sonic-moe``, arXiv 2512.14080), where it is installed and runs.

It has its own autograd functions, whose memory is the same as ours: tokens and the up projection are saved. Weights and
their gradients keep our layout without a copy. It pads the routes (see :func:`padded_rows`) and counts them on the
host, so each layer waits for the GPU once.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from dynmoe.errors import ConfigError
from dynmoe.ops.permute import Permutation

# Of sonic-moe 0.1.2, the first that accepts gate and up projections one after another (concat_layout):
# moe_general_routing_inputs(x, router_scores, token_indices, expert_indices, w1, b1, w2, b2, E, stream_id,
# activation_type, is_inference_mode_enabled=False, concat_layout=False) -> (output, tokens of each expert).
_FUNCTION = "moe_general_routing_inputs"
# Major compute capabilities of Hopper and of Blackwell's data center cards.
_CARDS = (9, 10)
# Widths, so that rows begin at 16 bytes.
_MULTIPLE = 8
# Padded rows: a multiple of a tile, and of a sixteenth of a power of two.
_TILE = 128
_SIZES = 16


def _refusal(problem: str, cure: str = "use auto") -> ConfigError:
    return ConfigError("train.moe_backend", "sonic", problem, cure)


def load_sonic(device: torch.device, dtype: torch.dtype) -> ModuleType:
    """Imports SonicMoE's package.

    Raises:
        ConfigError: it is not installed, or does not run on the device or with the dtype.
    """
    if find_spec("sonicmoe") is None:
        raise _refusal("requires sonic-moe, which is not installed", "install it, or use auto")
    if device.type != "cuda":
        raise _refusal(f"does not run on {device}")
    major, minor = torch.cuda.get_device_capability(device)
    if major not in _CARDS:
        raise _refusal(f"requires Hopper or data center Blackwell, not a card of compute capability {major}.{minor}")
    if dtype != torch.bfloat16:
        raise _refusal(f"does not compute in {str(dtype).removeprefix('torch.')}", "use train.precision=bf16, or auto")
    try:
        package = import_module("sonicmoe")
    except ImportError as error:
        raise _refusal(f"sonic-moe cannot be imported: {error}", "install what it requires, or use auto") from error
    if "concat_layout" not in signature(getattr(package, _FUNCTION)).parameters:
        raise _refusal("this sonic-moe has no concat_layout", "install 0.1.2 or later, or use auto")
    return package


def padded_rows(num_rows: int) -> int:
    """The number of rows that are computed: at most 6 % more, or a tile, and one of few sizes.

    SonicMoE times many variants of each product for each number of rows that it meets. With dynamic routing that
    would be every step.
    """
    step = max(_TILE, (1 << num_rows.bit_length() >> 1) // _SIZES)
    return max(1, -(-num_rows // step)) * step


class SonicBackend:
    """Computes experts with the function of ``package``, which is ``sonicmoe``."""

    name = "sonic"

    def __init__(self, package: ModuleType) -> None:
        self._compute = getattr(package, _FUNCTION)
        self._activation = package.enums.ActivationType.SWIGLU

    def permutation(self, routing_map_TE: Tensor, max_rows: int | None = None) -> Permutation:
        """Counts the rows exactly, whatever the bound."""
        return Permutation.of(routing_map_TE)

    def experts(
        self, x_TD: Tensor, gates_TE: Tensor, w_up_EHD: Tensor, w_down_EDF: Tensor, permutation: Permutation
    ) -> Tensor:
        """Sum over the experts of each token, [T, D], with autograd.

        Raises:
            ConfigError: a width is not a multiple of 8.
        """
        num_experts, hidden, width = w_down_EDF.shape
        if hidden % _MULTIPLE or width % _MULTIPLE:
            cure = f"use multiples of {_MULTIPLE}, or auto"
            raise _refusal(f"model.hidden is {hidden} and model.moe.expert_hidden is {width}", cure)
        if len(x_TD) == 0:  # as of one token without experts, so that weights have gradients
            x_1D = F.pad(x_TD, (0, 0, 0, 1))
            return self.experts(x_1D, F.pad(gates_TE, (0, 0, 0, 1)), w_up_EHD, w_down_EDF, permutation)[:0]
        route_M, gates_M = _routes_by_token(gates_TE, permutation)
        stream = torch.cuda.current_stream().cuda_stream if x_TD.is_cuda else 0
        y_TD, _ = self._compute(
            x_TD.contiguous(), gates_M, route_M // num_experts, route_M % num_experts, w_up_EHD.permute(1, 2, 0), None,
            w_down_EDF.permute(1, 2, 0), None, num_experts, stream, self._activation, concat_layout=True,
        )  # fmt: skip
        if y_TD.requires_grad:
            y_TD.register_hook(Tensor.contiguous)  # its products need strides, which the gradient of a sum has not
        return y_TD


def _routes_by_token(gates_TE: Tensor, permutation: Permutation) -> tuple[Tensor, Tensor]:
    """Routes sorted by token, int32 [M], and their gates, [M]: padded by routes with gate 0, spread over all tokens.

    A gate of 0 gives neither an output nor a gradient.
    """
    num_tokens, num_experts = gates_TE.shape
    spare = padded_rows(len(permutation.route_N)) - len(permutation.route_N)
    index = torch.arange(spare, device=gates_TE.device)
    spare_routes = index * num_tokens // max(spare, 1) * num_experts + index % num_experts
    route_M, order_M = torch.cat([permutation.route_N, spare_routes]).sort()
    gates_M = F.pad(permutation.of_rows(gates_TE), (0, spare)).index_select(0, order_M)
    return route_M.to(torch.int32), gates_M
