"""Routed experts on our Triton kernels: three launches forward, six backward, without device synchronization.

Shape letters besides those of ``dynmoe.routing``: I, J columns of an operand, P parts of a row.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.graph import increment_version
from triton.tools.tensor_descriptor import TensorDescriptor

from dynmoe.ops.backends import Gradients, Sums
from dynmoe.ops.permute import Permutation
from dynmoe.ops.triton.combine import gate_gradient, sum_rows
from dynmoe.ops.triton.gemm import Tiles, _activation_gradient_kernel, _rows_kernel, _up_kernel
from dynmoe.ops.triton.routes import build_routes
from dynmoe.ops.triton.weight_gradients import _weights_kernel

# (at least this many rows expected per expert, rows of a tile): mostly empty tiles waste work. Estimated from registers
# and shared memory of an H100, not yet measured on one; ``python -m bench gpu_day --parts tiles`` does.
_ROW_TILES = ((96, 128), (48, 64), (24, 32), (0, 16))
# Compute capabilities (90: 9.0) of Hopper and of Blackwell's data center cards. Their products read shared memory, of
# which there is enough for tiles of 256 columns.
_WIDE_TILES = (90, 100, 103)
# Cards from Hopper on copy whole tiles (TMA), which a descriptor of the tensor tells them.
_DESCRIPTORS_SINCE = 90
# Columns at a time of the activation's gradient, and of a weight's gradient that is added to a sum.
_PART = 16
# One compiled kernel for all numbers of experts up to this one.
_FEW_EXPERTS = 128


def _capability() -> int:
    """Compute capability of the card that kernels are compiled for; the interpreter does what all cards can."""
    if triton.knobs.runtime.interpret:
        return _DESCRIPTORS_SINCE
    return triton.runtime.driver.active.get_current_target().arch


@cache
def _multiprocessors(device: torch.device) -> int:
    """Few in the interpreter, which runs programs one after another."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def choose_tiles(kind: str, num_rows: int, num_experts: int, dtype: torch.dtype, capability: int) -> Tiles:
    """Chooses the tile sizes of a product.

    Args:
        kind: ``up`` and ``gradient`` for the fused kernels, ``rows`` for other products over rows, ``weights`` for
            gradients of weights.
        num_experts: number of experts that share the rows.
    """
    rows = next(size for at_least, size in _ROW_TILES if num_rows // max(num_experts, 1) >= at_least)
    fused = kind in ("up", "gradient")
    if dtype == torch.float32:  # no tensor cores at full precision: small tiles save registers
        return Tiles(64 if kind == "weights" else min(rows, 64), 32 if fused else 64, 16, 4, 2)
    wide = capability in _WIDE_TILES
    if kind == "weights":
        return Tiles(128, 256 if wide else 128, 64, 8, 3)
    if rows < 128:
        return Tiles(rows, 64 if fused else 128, 64, 4, 3)
    if kind == "gradient":  # two programs on a multiprocessor
        return Tiles(rows, 128 if wide else 64, 64, 8, 3, registers=128)
    # The up projection multiplies two tiles of columns at a time.
    columns = {"up": 128, "rows": 256} if wide else {"up": 64, "rows": 128}
    return Tiles(rows, columns[kind], 64, 8, 4 if wide else 3)


class _Launch:
    """Launch parameters shared by all kernels over one permutation."""

    def __init__(self, permutation: Permutation, like: Tensor) -> None:
        self.num_rows = permutation.token_N.shape[0]
        self.ends_E = permutation.ends_E
        self.num_experts = len(self.ends_E)
        self.device = like.device
        self.dtype = like.dtype
        self.capability = _capability()
        # As in PyTorch's own products: full fp32 unless the user allows TF32.
        full = like.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32"
        self.precision = "ieee" if full else "tf32"

    def tiles(self, kind: str) -> Tiles:
        return choose_tiles(kind, self.num_rows, self.num_experts, self.dtype, self.capability)

    def grid(self, most_tiles: int, tiles: Tiles) -> tuple[int]:
        """One program for each place on the device: eight warps with a wide tile fill a multiprocessor."""
        fills = tiles.warps == 8 and self.capability in _WIDE_TILES
        places = _multiprocessors(self.device) * (1 if fills else 2)
        return (max(1, min(most_tiles, places)),)

    def row_grid(self, tiles: Tiles, width: int) -> tuple[int]:
        return self.grid(self.most_tiles(tiles, width), tiles)

    def most_tiles(self, tiles: Tiles, width: int) -> int:
        return (triton.cdiv(self.num_rows, tiles.rows) + self.num_experts) * triton.cdiv(width, tiles.columns)

    def uses_descriptors(self, *operands: Tensor) -> bool:
        """Whether a kernel reads these operands by descriptors: the card has them, and rows begin at 16 bytes.

        Not in fp32, whose products read registers.
        """
        aligned = all(
            x.numel() > 0 and x.data_ptr() % 16 == 0 and x.shape[-1] * x.element_size() % 16 == 0 for x in operands
        )
        return self.capability >= _DESCRIPTORS_SINCE and self.dtype != torch.float32 and aligned

    def meta(self, tiles: Tiles) -> dict[str, Any]:
        return {
            "ROWS": tiles.rows, "COLUMNS": tiles.columns, "DEPTH": tiles.depth, "GROUP": tiles.group,
            "PRECISION": self.precision, "num_warps": tiles.warps, "num_stages": tiles.stages,
            "maxnreg": tiles.registers,
        }  # fmt: skip

    def row_meta(self, tiles: Tiles, depth: int) -> dict[str, Any]:
        padded = max(_FEW_EXPERTS, triton.next_power_of_2(self.num_experts))
        return {**self.meta(tiles), "E_PAD": padded, "EVEN": depth % tiles.depth == 0}


def _described(operand: Tensor, use: bool, *block: int) -> Tensor | TensorDescriptor:
    """The operand as a kernel reads it: by tiles of a shape, or by pointers."""
    return TensorDescriptor.from_tensor(operand, list(block)) if use else operand


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Makes this device the current one, on which Triton launches; autograd does so in the backward pass."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class TritonBackend:
    """Gathers rows and applies the activation inside the products, then sums rows by token.

    The only tensors with routed rows are h, the activation and the rows to be summed. They have as many rows as the
    permutation; kernels read on the device how many are in use.
    """

    name = "triton"

    def permutation(self, routing_map_TE: Tensor, max_rows: int | None = None) -> Permutation:
        """Synchronizes with the device if no bound is given."""
        rows = int(routing_map_TE.sum()) if max_rows is None else max_rows
        with _on(routing_map_TE.device):
            return Permutation(*build_routes(routing_map_TE, rows))

    def forward(
        self, x_TD: Tensor, gates_TE: Tensor, w_up_EHD: Tensor, w_down_EDF: Tensor, permutation: Permutation
    ) -> tuple[Tensor, Tensor]:
        with _on(x_TD.device):
            return self._forward(x_TD, gates_TE, w_up_EHD, w_down_EDF, permutation)

    def _forward(
        self, x_TD: Tensor, gates_TE: Tensor, w_up_EHD: Tensor, w_down_EDF: Tensor, permutation: Permutation
    ) -> tuple[Tensor, Tensor]:
        launch = _Launch(permutation, x_TD)
        hidden, width = w_down_EDF.shape[1:]
        h_NH = x_TD.new_empty(launch.num_rows, 2 * width)
        a_NF = x_TD.new_empty(launch.num_rows, width)
        tiles = launch.tiles("up")
        # Gate and up projection are two matrices of each expert.
        w_up = w_up_EHD.contiguous().view(-1, width, hidden)
        tma = launch.uses_descriptors(w_up)
        _up_kernel[launch.row_grid(tiles, width)](
            x_TD.contiguous(), permutation.token_N, permutation.route_N, gates_TE.contiguous(),
            _described(w_up, tma, 1, tiles.columns, tiles.depth), h_NH, a_NF, launch.ends_E, launch.num_experts,
            hidden, width, TMA=tma, **launch.row_meta(tiles, hidden),
        )  # fmt: skip
        rows_ND = _rows_product(launch, a_NF, w_down_EDF, linear=True)
        return sum_rows(rows_ND, permutation.row_N, permutation.token_offsets), h_NH

    def backward(
        self,
        grad_TD: Tensor,
        h_NH: Tensor,
        x_TD: Tensor,
        gates_TE: Tensor,
        w_up_EHD: Tensor,
        w_down_EDF: Tensor,
        permutation: Permutation,
        *,
        of_weights: bool = True,
        sums: Sums = (None, None),
    ) -> Gradients:
        launch = _Launch(permutation, x_TD)
        hidden, width = w_down_EDF.shape[1:]
        tiles = launch.tiles("gradient")
        a_NF = x_TD.new_empty(launch.num_rows, width)
        partial_NP = gates_TE.new_empty(launch.num_rows, triton.cdiv(width, tiles.columns))
        w_down_EDF = w_down_EDF.contiguous()
        tma = launch.uses_descriptors(w_down_EDF)
        _activation_gradient_kernel[(launch.most_tiles(tiles, width),)](
            grad_TD, permutation.token_N, permutation.route_N, gates_TE.contiguous(),
            _described(w_down_EDF, tma, 1, tiles.depth, tiles.columns), h_NH, a_NF, partial_NP, launch.ends_E,
            launch.num_experts, hidden, width, PART=_PART, TMA=tma, **launch.row_meta(tiles, hidden),
        )  # fmt: skip
        grad_gates_TE = gate_gradient(partial_NP, permutation.route_N, launch.ends_E, gates_TE)
        token_N = permutation.token_N
        grad_h_NH = h_NH  # overwritten by the kernel
        grad_up_EHD = grad_down_EDF = None
        sum_up_EHD, sum_down_EDF = sums
        if of_weights:
            grad_down_EDF = _weights_product(launch, grad_TD, a_NF, token_N, sum_down_EDF, gather_a=True)
        del a_NF, partial_NP
        if of_weights:
            x_TD = x_TD.contiguous()
            grad_up_EHD = _weights_product(launch, grad_h_NH, x_TD, token_N, sum_up_EHD, gather_a=False)
        grad_rows_ND = _rows_product(launch, grad_h_NH, w_up_EHD, linear=False)
        grad_x_TD = sum_rows(grad_rows_ND, permutation.row_N, permutation.token_offsets)
        return grad_x_TD, grad_gates_TE, grad_up_EHD, grad_down_EDF


def _rows_product(launch: _Launch, a_NJ: Tensor, w: Tensor, *, linear: bool) -> Tensor:
    """Multiplies each row by the matrix of its expert, [N, I]; linear: w is [E, I, J], otherwise [E, J, I]."""
    w = w.contiguous()
    depth = a_NJ.shape[1]
    width = w.shape[1 if linear else 2]
    out_NI = a_NJ.new_empty(launch.num_rows, width)
    tiles = launch.tiles("rows")
    block = (tiles.columns, tiles.depth) if linear else (tiles.depth, tiles.columns)
    tma = launch.uses_descriptors(a_NJ, w)
    _rows_kernel[launch.row_grid(tiles, width)](
        _described(a_NJ, tma, tiles.rows, tiles.depth), _described(w, tma, 1, *block), out_NI, launch.ends_E,
        launch.num_experts, depth, width, LINEAR=linear, TMA=tma, **launch.row_meta(tiles, depth),
    )  # fmt: skip
    return out_NI


def _weights_product(
    launch: _Launch, a: Tensor, b: Tensor, token_N: Tensor, total_EIJ: Tensor | None, *, gather_a: bool
) -> Tensor | None:
    """Multiplies a^T by b over the rows of each expert, [E, I, J]; one operand has rows, the other tokens to gather.

    Adds the product to ``total_EIJ`` if it is given, and returns None.
    """
    height = a.shape[1]
    width = b.shape[1]
    adds = total_EIJ is not None
    out_EIJ = a.new_empty(launch.num_experts, height, width) if total_EIJ is None else total_EIJ
    tiles = launch.tiles("weights")
    most = launch.num_experts * triton.cdiv(height, tiles.rows) * triton.cdiv(width, tiles.columns)
    tma = launch.uses_descriptors(b if gather_a else a)
    _weights_kernel[launch.grid(most, tiles)](
        _described(a, tma and not gather_a, tiles.depth, tiles.rows),
        _described(b, tma and gather_a, tiles.depth, tiles.columns),
        token_N, out_EIJ, launch.ends_E, launch.num_experts, HEIGHT=height, WIDTH=width, GATHER_A=gather_a, PART=_PART,
        ADDS=adds, TMA=tma, **launch.meta(tiles),
    )  # fmt: skip
    if adds:
        increment_version(out_EIJ)  # autograd cannot see what kernels write
    return None if adds else out_EIJ
