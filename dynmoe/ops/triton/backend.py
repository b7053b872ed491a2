"""Routed experts on our Triton kernels: three launches forward, six backward, without device synchronization.

Shape letters besides those of ``dynmoe.routing``: I, J columns of an operand, P parts of a row.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
from torch import Tensor

from dynmoe.ops.backends import Gradients
from dynmoe.ops.permute import Permutation
from dynmoe.ops.triton.combine import gate_gradient, sum_rows
from dynmoe.ops.triton.gemm import Tiles, _activation_gradient_kernel, _rows_kernel, _up_kernel, _weights_kernel
from dynmoe.ops.triton.routes import build_routes

# (at least this many rows expected per expert, rows of a tile): mostly empty tiles waste work. Estimated from registers
# and shared memory of an H100, not yet measured on one; ``python -m bench gpu_layer --tune`` does.
_ROW_TILES = ((96, 128), (48, 64), (24, 32), (0, 16))
_WARPS = {128: 8, 64: 4, 32: 4, 16: 4}
# Programs on one multiprocessor: small tiles leave room for more than one.
_PROGRAMS_PER_SM = 2


@cache
def _num_programs(device: torch.device) -> int:
    """Number of programs that a GPU holds at a time; few in the interpreter, which runs them one after another."""
    if device.type != "cuda":
        return 4
    return _PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count


def choose_tiles(num_rows: int, num_experts: int, dtype: torch.dtype, fused: bool) -> Tiles:
    """Chooses the tile sizes of the products over rows.

    Args:
        num_experts: number of experts that share the rows.
        fused: for the two fused kernels, which need registers for more than one accumulator.
    """
    rows = next(size for at_least, size in _ROW_TILES if num_rows // max(num_experts, 1) >= at_least)
    if dtype == torch.float32:  # no tensor cores at full precision: small tiles save registers
        return Tiles(min(rows, 64), 32 if fused else 64, 32, 4, 2)
    return Tiles(rows, 64 if fused else 128, 64, _WARPS[rows], 3)


def weight_tiles(dtype: torch.dtype) -> Tiles:
    return Tiles(64, 64, 32, 4, 2) if dtype == torch.float32 else Tiles(128, 128, 64, 8, 3)


class _Launch:
    """Launch parameters shared by all kernels over one permutation."""

    def __init__(self, permutation: Permutation, like: Tensor) -> None:
        self.num_rows = permutation.token_N.shape[0]
        self.ends_E = permutation.ends_E
        self.num_experts = len(self.ends_E)
        self.device = like.device
        # As in PyTorch's own products: full fp32 unless the user allows TF32.
        full = like.dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32
        self.precision = "ieee" if full else "tf32"

    def grid(self, most_tiles: int) -> tuple[int]:
        return (max(1, min(most_tiles, _num_programs(self.device))),)

    def row_grid(self, tiles: Tiles, width: int) -> tuple[int]:
        most = triton.cdiv(self.num_rows, tiles.rows) + self.num_experts
        return self.grid(most * triton.cdiv(width, tiles.columns))

    def meta(self, tiles: Tiles) -> dict[str, int | str]:
        return {
            "E": self.num_experts, "ROWS": tiles.rows, "COLUMNS": tiles.columns, "DEPTH": tiles.depth,
            "PRECISION": self.precision, "num_warps": tiles.warps, "num_stages": tiles.stages,
        }  # fmt: skip

    def row_meta(self, tiles: Tiles) -> dict[str, int | str]:
        return {**self.meta(tiles), "E_PAD": triton.next_power_of_2(self.num_experts)}


class TritonBackend:
    """Gathers rows and applies the activation inside the products, then sums rows by token.

    The only tensors with routed rows are h, the activation and the rows to be summed. They have as many rows as the
    permutation; kernels read on the device how many are in use.
    """

    name = "triton"

    def permutation(self, routing_map_TE: Tensor, max_rows: int | None = None) -> Permutation:
        """Synchronizes with the device if no bound is given."""
        rows = int(routing_map_TE.sum()) if max_rows is None else max_rows
        return Permutation(*build_routes(routing_map_TE, rows))

    def forward(
        self, x_TD: Tensor, gates_TE: Tensor, w_up_EHD: Tensor, w_down_EDF: Tensor, permutation: Permutation
    ) -> tuple[Tensor, Tensor]:
        launch = _Launch(permutation, x_TD)
        hidden, width = w_down_EDF.shape[1:]
        h_NH = x_TD.new_empty(launch.num_rows, 2 * width)
        a_NF = x_TD.new_empty(launch.num_rows, width)
        tiles = choose_tiles(launch.num_rows, launch.num_experts, x_TD.dtype, fused=True)
        _up_kernel[launch.row_grid(tiles, width)](
            x_TD.contiguous(), permutation.token_N, permutation.route_N, gates_TE.contiguous(), w_up_EHD.contiguous(),
            h_NH, a_NF, launch.ends_E, width, hidden, **launch.row_meta(tiles),
        )  # fmt: skip
        rows_ND = _rows_product(launch, a_NF, w_down_EDF.transpose(1, 2))
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
    ) -> Gradients:
        launch = _Launch(permutation, x_TD)
        hidden, width = w_down_EDF.shape[1:]
        tiles = choose_tiles(launch.num_rows, launch.num_experts, x_TD.dtype, fused=True)
        a_NF = x_TD.new_empty(launch.num_rows, width)
        partial_NP = gates_TE.new_empty(launch.num_rows, triton.cdiv(width, tiles.columns))
        _activation_gradient_kernel[launch.row_grid(tiles, width)](
            grad_TD, permutation.token_N, permutation.route_N, gates_TE.contiguous(), w_down_EDF.contiguous(), h_NH,
            a_NF, partial_NP, launch.ends_E, width, hidden, **launch.row_meta(tiles),
        )  # fmt: skip
        grad_gates_TE = gate_gradient(partial_NP, permutation.route_N, launch.ends_E, gates_TE)
        token_N = permutation.token_N
        grad_h_NH = h_NH  # overwritten by the kernel
        grad_down_EDF = _weights_product(launch, grad_TD, a_NF, token_N, gather_a=True)
        del a_NF, partial_NP
        grad_up_EHD = _weights_product(launch, grad_h_NH, x_TD.contiguous(), token_N, gather_a=False)
        grad_rows_ND = _rows_product(launch, grad_h_NH, w_up_EHD)
        grad_x_TD = sum_rows(grad_rows_ND, permutation.row_N, permutation.token_offsets)
        return grad_x_TD, grad_gates_TE, grad_up_EHD, grad_down_EDF


def _rows_product(launch: _Launch, a_NJ: Tensor, b_EJI: Tensor) -> Tensor:
    """Multiplies each row by the matrix of its expert, [N, I]; b may have any strides."""
    width = b_EJI.shape[2]
    out_NI = a_NJ.new_empty(launch.num_rows, width)
    tiles = choose_tiles(launch.num_rows, launch.num_experts, a_NJ.dtype, fused=False)
    _rows_kernel[launch.row_grid(tiles, width)](
        a_NJ, b_EJI, out_NI, launch.ends_E, width, a_NJ.shape[1], *b_EJI.stride(),
        **launch.row_meta(tiles),
    )  # fmt: skip
    return out_NI


def _weights_product(launch: _Launch, a: Tensor, b: Tensor, token_N: Tensor, *, gather_a: bool) -> Tensor:
    """Multiplies a^T by b over the rows of each expert, [E, I, J]; one operand has rows, the other tokens to gather."""
    height = a.shape[1]
    width = b.shape[1]
    out_EIJ = a.new_empty(launch.num_experts, height, width)
    tiles = weight_tiles(a.dtype)
    most = launch.num_experts * triton.cdiv(height, tiles.rows) * triton.cdiv(width, tiles.columns)
    _weights_kernel[launch.grid(most)](
        a, b, token_N, out_EIJ, launch.ends_E, height, width, GATHER_A=gather_a,
        **launch.meta(tiles),
    )  # fmt: skip
    return out_EIJ
