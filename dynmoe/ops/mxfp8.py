"""Products of experts with operands in MXFP8: elements in E4M3 and a power of two for each 32 along the contraction.

The format is that of the OCP Microscaling Formats specification (MX) v1.0. All three products of an expert take such
operands: of the forward pass, of the gradients of its inputs and of the gradients of its weights. Tensors are quantized
for each product, because each contracts another axis; no quantized copy outlives its product.

Letters besides those of ``dynmoe.routing``: I, J outer sizes of a product, K contraction, P rows with padding, R, C
rows and columns of scales.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dynmoe.config.constants import MXFP8_BLOCK
from dynmoe.errors import ConfigError, first_line
from dynmoe.ops.backends import PackedBackend, looped_mm
from dynmoe.ops.native import native_activation_backward

# The card reads scales in tiles of 128 rows and 4 blocks. Each expert's rows are padded to a multiple of 128, which are
# also 4 blocks if rows are contracted, so that no tile has scales of two experts.
_TILE_ROWS = 128
_TILE_BLOCKS = 4
# Largest E4M3 number, 448 = 0.875 * 2^9, as mantissa and exponent of frexp.
_LARGEST_MANTISSA = 0.875
_LARGEST_EXPONENT = 9
# E8M0: the exponent of the byte 0, and the byte for NaN.
_SMALLEST_SCALE = -127
_NAN = 255
# Major compute capability of the cards for which PyTorch has the product: data center Blackwell.
CAPABILITY = 10


@dataclass(frozen=True)
class Blocks:
    """A tensor in MXFP8, contraction last.

    Attributes:
        elements: E4M3, of the tensor's shape, contiguous.
        scales: E8M0 as bytes, one for each 32 elements of the last axis.
    """

    elements: Tensor
    scales: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Blocks:
        """Quantizes along the last axis, whose size is a multiple of 32.

        The scale is the smallest power of two with which no element of the block exceeds E4M3's largest number, as in
        arXiv 2506.08027. Section 6.3 of the specification takes half of it where the largest element then lies between
        448 and 512, and cuts that off. A block with an element that is not finite becomes NaN, so that a step
        whose values are not finite is still found.
        """
        blocks = x.unflatten(-1, (-1, MXFP8_BLOCK))
        largest = blocks.abs().amax(dim=-1).float()
        mantissa, exponent = torch.frexp(largest)
        exponent = exponent - _LARGEST_EXPONENT + (mantissa > _LARGEST_MANTISSA)
        scales = (exponent.clamp(min=_SMALLEST_SCALE) - _SMALLEST_SCALE).masked_fill(~largest.isfinite(), _NAN)
        scales = scales.to(torch.uint8)
        # The division is exact: only the exponent changes.
        elements = (blocks / _numbers(scales).to(x.dtype).unsqueeze(-1)).to(torch.float8_e4m3fn)
        return cls(elements.flatten(-2).contiguous(), scales.contiguous())

    def dequantized(self) -> Tensor:
        """The numbers that the blocks stand for, in fp32."""
        blocks = self.elements.float().unflatten(-1, (-1, MXFP8_BLOCK))
        return (blocks * _numbers(self.scales).unsqueeze(-1)).flatten(-2)


def _numbers(scales: Tensor) -> Tensor:
    return scales.view(torch.float8_e8m0fnu).float()


# Products of (a [I, K], b [J, K], or [E, J, K] with a group of rows of a for each) and the end of each group, int32: of
# rows of a, giving [I, J], or of the contraction, giving [E, I, J].
Multiply = Callable[[Blocks, Blocks, Tensor], Tensor]


def emulated_product(a: Blocks, b: Blocks, ends_E: Tensor) -> Tensor:
    """What the card computes, in fp32 on any device, one expert at a time."""
    return looped_mm(a.dequantized(), b.dequantized().transpose(-1, -2), ends_E)


def card_product(a: Blocks, b: Blocks, ends_E: Tensor) -> Tensor:
    """PyTorch's scaled grouped product, with bf16 results. :func:`_check_card` compares it with the emulation."""
    contracted = b.elements.dim() == 2
    scales_a = contraction_scales(a.scales, ends_E) if contracted else row_scales(a.scales)
    scales_b = contraction_scales(b.scales, ends_E) if contracted else row_scales(b.scales)
    recipe = F.ScalingType.BlockWise1x32
    swizzle = F.SwizzleType.SWIZZLE_32_4_4
    return F.scaled_grouped_mm(  # type: ignore[attr-defined,no-any-return]
        a.elements, b.elements.transpose(-1, -2), scales_a.view(torch.float8_e8m0fnu), recipe,
        scales_b.view(torch.float8_e8m0fnu), recipe, swizzle, swizzle, offs=ends_E, output_dtype=torch.bfloat16,
    )  # fmt: skip


def scale_tiles(scales_RC: Tensor) -> Tensor:
    """Splits scales into the tiles that the card reads, [..., tiles of rows, tiles of columns, 512].

    Element 16 (r mod 32) + 4 (r div 32) + c of a tile is the scale of its row r and column c (cuBLAS documentation, 1D
    block scaling factors layout). Missing rows and columns are filled up.
    """
    rows, columns = scales_RC.shape[-2:]
    padded = F.pad(scales_RC, (0, -columns % _TILE_BLOCKS, 0, -rows % _TILE_ROWS))
    split = padded.unflatten(-1, (-1, _TILE_BLOCKS)).unflatten(-3, (-1, _TILE_ROWS // 32, 32))
    return split.transpose(-4, -2).flatten(-3)


def row_scales(scales: Tensor) -> Tensor:
    """Scales of rows in groups of whole tiles, [P, C], or of one matrix for each expert, [E, R * C]; both padded."""
    tiles = scale_tiles(scales)
    return tiles.flatten(1) if scales.dim() == 3 else tiles.reshape(scales.shape[0], -1)


def contraction_scales(scales_RC: Tensor, ends_E: Tensor) -> Tensor:
    """Scales of a contraction in groups of whole tiles, padded [R, C]: all tiles of a group precede those of the next.

    Args:
        ends_E: end of each group along the contraction; columns after the last are a further group.
    """
    tiles = scale_tiles(scales_RC)
    high, wide = tiles.shape[:2]
    column_W = torch.arange(wide, device=tiles.device)
    starts = F.pad(ends_E.long() // _TILE_ROWS, (1, 0))
    group_W = torch.searchsorted(starts[1:], column_W, right=True)
    width_W = F.pad(starts, (0, 1), value=wide).diff()[group_W]
    start_W = starts[group_W]
    row_H1 = torch.arange(high, device=tiles.device)[:, None]
    place_HW = high * start_W + row_H1 * width_W + column_W - start_W
    ordered = torch.empty_like(tiles).flatten(0, 1).index_copy_(0, place_HW.flatten(), tiles.flatten(0, 1))
    return ordered.view(high * _TILE_ROWS, -1)


@dataclass(frozen=True)
class PaddedRows:
    """Rows sorted by expert, with each expert's padded by zeros to whole tiles, at least one.

    An expert without rows has a tile too, because the product of an empty group is not documented.

    Attributes:
        place_N: padded row of each row.
        ends_E: end of each expert's padded rows, int32.
        most: an upper bound of their number that the host knows, so that it need not wait for a GPU.
    """

    place_N: Tensor
    ends_E: Tensor
    most: int

    @classmethod
    def of(cls, ends_E: Tensor, num_rows: int) -> PaddedRows:
        ends_E = ends_E.long()
        starts_E = F.pad(ends_E, (1, 0))[:-1]
        tiles_E = ((ends_E - starts_E + _TILE_ROWS - 1) // _TILE_ROWS).clamp(min=1)
        padded_E = (tiles_E * _TILE_ROWS).cumsum(0)
        shift_E = padded_E - tiles_E * _TILE_ROWS - starts_E
        row_N = torch.arange(num_rows, device=ends_E.device)
        place_N = row_N + shift_E[torch.searchsorted(ends_E, row_N, right=True)]
        return cls(place_N, padded_E.to(torch.int32), (num_rows // _TILE_ROWS + len(ends_E)) * _TILE_ROWS)

    def pad(self, rows_NJ: Tensor) -> Tensor:
        return rows_NJ.new_zeros(self.most, rows_NJ.shape[1]).index_copy_(0, self.place_N, rows_NJ)


def mxfp8_mm(a: Tensor, b: Tensor, ends_E: Tensor, multiply: Multiply) -> Tensor:
    """:func:`dynmoe.ops.backends.grouped_mm` with operands in MXFP8.

    Sizes of a, and of b unless rows are contracted, are multiples of 32. If rows are contracted (gradients of
    weights), the blocks of an expert begin at its first row, and its last one is filled up with zeros. Which rows
    share a block then depends on the rows that an expert has on this rank.
    """
    if b.dim() == 3:
        padded = PaddedRows.of(ends_E, a.shape[0])
        out_PI = multiply(Blocks.of(padded.pad(a)), Blocks.of(b.transpose(1, 2)), padded.ends_E)
        return out_PI.index_select(0, padded.place_N).to(a.dtype)
    padded = PaddedRows.of(ends_E, b.shape[0])
    a_IP, b_JP = (padded.pad(operand_NJ).t() for operand_NJ in (a.t(), b))
    return multiply(Blocks.of(a_IP), Blocks.of(b_JP), padded.ends_E).to(a.dtype)


def mxfp8_backend(name: str, device: torch.device, dtype: torch.dtype) -> PackedBackend:
    """The backend ``mxfp8`` of a card that has the products, or ``mxfp8_emulated`` of any device.

    Raises:
        ConfigError: the card or this build of PyTorch has no such products.
    """
    multiply = emulated_product
    if name == "mxfp8":
        _check_card(device, dtype)
        multiply = card_product
    return PackedBackend(
        name, lambda a, b, ends_E: mxfp8_mm(a, b, ends_E, multiply), native_activation_backward, always=True
    )


def _refusal(problem: str, cure: str = "use auto") -> ConfigError:
    return ConfigError("train.moe_backend", "mxfp8", problem, cure)


def _check_card(device: torch.device, dtype: torch.dtype) -> None:
    if device.type != "cuda":
        raise _refusal(f"does not run on {device}", "use auto, or mxfp8_emulated, which is slow, to see its effect")
    major, minor = torch.cuda.get_device_capability(device)
    if major != CAPABILITY:
        card = f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor})"
        raise _refusal(f"requires data center Blackwell (compute capability {CAPABILITY}), not {card}")
    if dtype != torch.bfloat16:
        raise _refusal(f"does not compute in {str(dtype).removeprefix('torch.')}", "use train.precision=bf16, or auto")
    try:
        difference = _difference_from_emulation(device)
    except Exception as error:
        problem = f"torch {torch.__version__} cannot multiply on {torch.cuda.get_device_name(device)}"
        raise _refusal(f"{problem}: {first_line(error)}", "use a build with this product, or auto") from error
    if not difference <= 2**-7:  # results are rounded to bf16
        problem = f"the product of torch {torch.__version__} differs from its emulation by {difference:.1e}"
        raise _refusal(problem)


def _difference_from_emulation(device: torch.device) -> float:
    """Largest relative norm of the difference, over both kinds of product with an expert without rows."""
    generator = torch.Generator().manual_seed(0)
    rows, depth, width = 300, 96, 160
    ends_E = torch.tensor([170, 170, rows], dtype=torch.int32, device=device)
    a_NK, b_NJ, w_EKJ = (
        torch.randn(*shape, generator=generator).to(device, torch.bfloat16)
        for shape in ((rows, depth), (rows, width), (3, depth, width))
    )
    differences = []
    for a, b in ((a_NK, w_EKJ), (a_NK.t(), b_NJ)):
        ours, expected = (mxfp8_mm(a, b, ends_E, multiply).float() for multiply in (card_product, emulated_product))
        differences.append(((ours - expected).norm() / expected.norm()).item())
    return max(differences)
