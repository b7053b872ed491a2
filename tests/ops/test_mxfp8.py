"""Products with operands in MXFP8: the format against a count over its grid, and the product against fp64."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from dynmoe.errors import ConfigError
from dynmoe.ops import Permutation, mxfp8, pick_backend, routed_experts
from dynmoe.ops.mxfp8 import Blocks, PaddedRows, contraction_scales, emulated_product, mxfp8_mm, row_scales
from harness import blackwell
from harness.memory import peak_bytes
from tests import oracles
from tests.ops.test_routed_experts import with_gradients

CPU = torch.device("cpu")
EMULATED = pick_backend("mxfp8_emulated", CPU, torch.float32)
INF = math.inf


def e4m3_grid() -> list[float]:
    """The non-negative numbers of E4M3 in order of their bytes: OCP OFP8 specification 1.0, tables 1 and 2."""
    subnormal = [mantissa / 8 * 2.0**-6 for mantissa in range(8)]
    normal = [(1 + mantissa / 8) * 2.0 ** (exponent - 7) for exponent in range(1, 16) for mantissa in range(8)]
    return (subnormal + normal)[:-1]  # the last byte is NaN


GRID = e4m3_grid()


def nearest_byte(value: float) -> int:
    """The byte of the nearest number of the grid; of two, the even one."""
    byte = min(range(len(GRID)), key=lambda n: (abs(GRID[n] - abs(value)), n % 2))
    return byte + 128 * (math.copysign(1.0, value) < 0)


def counted_block(values: list[float]) -> tuple[int, list[int]]:
    """Byte of the scale and bytes of the elements of a finite block, in fp64."""
    largest = max(abs(value) for value in values)
    exponent = next(exponent for exponent in range(-127, 128) if largest <= 448.0 * 2.0**exponent)
    return exponent + 127, [nearest_byte(value / 2.0**exponent) for value in values]


def bytes_of(blocks: Blocks) -> list[int]:
    return blocks.elements.view(torch.uint8).flatten().tolist()


BLOCKS = {
    "ordinary": [math.sin(7.0 * n) * 3 for n in range(32)],
    "largest is 448": [448.0, -1.0, 2.0**-9, 2.0**-10, 1.5 * 2.0**-10, 3.0, *[0.0] * 26],
    "largest is just above 448": [448.0 * (1 + 2**-23), *[17.0] * 31],
    "a power of two": [256.0, *[-255.0] * 31],
    "ties": [256.0, 17.0, 19.0, 21.0, 23.0, -25.0, -27.0, 2.0**-10, 3 * 2.0**-10, 5 * 2.0**-10, *[1.0] * 22],
    "wide": [2.0 ** (10 - n) for n in range(32)],
    "largest of fp32": [torch.finfo(torch.float32).max, 1.0, -(2.0**110), *[2.0**119] * 29],
    "smallest scale": [448 * 2.0**-127, 2.0**-127, *[2.0**-130] * 30],
    "below the smallest scale": [2.0**-140, -(2.0**-149), *[2.0**-136] * 30],
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_equal_a_count_over_the_grid(name):
    values = torch.tensor(BLOCKS[name])
    blocks = Blocks.of(values)
    scale, elements = counted_block([float(value) for value in values])
    assert blocks.scales.tolist() == [scale]
    assert bytes_of(blocks) == elements
    grid = [(-1.0 if byte >= 128 else 1.0) * GRID[byte % 128] for byte in elements]
    expected = torch.tensor([element * 2.0 ** (scale - 127) for element in grid])
    assert torch.equal(blocks.dequantized(), expected)


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=32, max_size=32))
def test_any_block_equals_a_count_over_the_grid(values):
    if any(values):
        blocks = Blocks.of(torch.tensor(values))
        assert (blocks.scales.tolist(), bytes_of(blocks)) == ([counted_block(values)[0]], counted_block(values)[1])


def test_the_grid_is_that_of_torch():
    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    assert numbers.tolist() == GRID
    assert GRID[-1] == 448.0
    scales = torch.arange(255, dtype=torch.uint8).view(torch.float8_e8m0fnu).double()
    assert scales.tolist() == [2.0 ** (byte - 127) for byte in range(255)]


def test_bf16_and_other_axes_are_quantized_alike():
    x = torch.randn(3, 64, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    for whole in (x.transpose(1, 2), x):
        blocks = Blocks.of(whole)
        exact = Blocks.of(whole.float().contiguous())
        assert blocks.elements.is_contiguous()
        assert torch.equal(blocks.scales, exact.scales)
        assert torch.equal(blocks.elements.view(torch.uint8), exact.elements.view(torch.uint8))
        counted = [counted_block(block.tolist()) for block in whole.float().reshape(-1, 32)]
        assert bytes_of(blocks) == [byte for _, elements in counted for byte in elements]


@pytest.mark.parametrize("value", [INF, -INF, math.nan])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_that_is_not_finite_becomes_nan_and_its_neighbors_do_not(value, dtype):
    x = torch.ones(2, 64, dtype=dtype)
    x[1, 40] = value
    numbers = Blocks.of(x).dequantized()
    assert numbers[1, 32:].isnan().all()
    assert torch.equal(numbers[0], torch.ones(64))
    assert torch.equal(numbers[1, :32], torch.ones(32))


def test_a_block_of_zeros_stays_zero():
    assert not Blocks.of(torch.zeros(2, 32)).dequantized().any()


def counted_layout(scales: torch.Tensor) -> torch.Tensor:
    """Flat scales of a matrix in the layout of cuBLAS: tiles of 128 rows and 4 columns, one after another."""
    rows, columns = scales.shape
    high = -(-rows // 128)
    wide = -(-columns // 4)
    out = torch.zeros(high * wide * 512, dtype=torch.uint8)
    for row in range(rows):
        for column in range(columns):
            tile = row // 128 * wide + column // 4
            out[512 * tile + row % 32 * 16 + row % 128 // 32 * 4 + column % 4] = scales[row, column]
    return out


@pytest.mark.parametrize(("rows", "columns"), [(128, 4), (256, 3), (130, 9), (1, 1)])
def test_scales_lie_where_the_card_reads_them(rows, columns):
    scales = torch.randint(0, 255, (2, rows, columns), dtype=torch.uint8)
    assert torch.equal(row_scales(scales), torch.stack([counted_layout(own) for own in scales]))
    if rows % 128 == 0:
        whole = row_scales(scales[0])
        assert whole.shape == (rows, -(-columns // 4) * 4)
        assert torch.equal(whole.flatten(), counted_layout(scales[0]))


def test_scales_of_a_contraction_lie_one_expert_after_another():
    """As PyTorch's own tests of the product join them."""
    ends = torch.tensor([256, 384, 896], dtype=torch.int32)  # and 128 columns that no expert has
    scales = torch.randint(0, 255, (200, 1024 // 32), dtype=torch.uint8)
    groups = [scales[:, start // 32 : end // 32] for start, end in pairwise([0, *ends.tolist(), 1024])]
    expected = torch.cat([counted_layout(group) for group in groups]).view(256, -1)
    assert torch.equal(contraction_scales(scales, ends), expected)


@pytest.mark.parametrize("counts", [[5, 0, 128, 129], [0, 0], [1], [300, 1, 0]])
def test_rows_are_padded_to_tiles_of_their_own(counts):
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)
    padded = PaddedRows.of(ends, sum(counts))
    rows = torch.randn(sum(counts), 32)
    whole = padded.pad(rows)
    groups = rows.split(counts)
    tiles = [max(1, -(-count // 128)) for count in counts]
    expected = torch.cat([F.pad(g, (0, 0, 0, 128 * n - len(g))) for g, n in zip(groups, tiles, strict=True)])
    assert padded.ends_E.tolist() == [128 * sum(tiles[: n + 1]) for n in range(len(tiles))]
    assert torch.equal(whole[: len(expected)], expected)
    assert not whole[len(expected) :].any()


def test_quantizing_takes_no_more_than_the_scaled_numbers_and_bytes():
    """As ``dynmoe.plan`` counts it."""
    x = torch.randn(64, 256, 512).bfloat16()
    for operand in (x, x.transpose(1, 2)):
        assert peak_bytes(lambda operand=operand: Blocks.of(operand)) <= 1.2 * 3 * x.numel()


def numbers_of(x: torch.Tensor) -> torch.Tensor:
    """The nearest numbers in MXFP8 in fp64, with blocks along the last axis from its start."""
    out = []
    for row in x.flatten(0, -2).tolist():
        for start in range(0, len(row), 32):
            scale, elements = counted_block(row[start : start + 32])
            out += [(-1.0 if b >= 128 else 1.0) * GRID[b % 128] * 2.0 ** (scale - 127) for b in elements]
    return torch.tensor(out, dtype=torch.float64).view(x.shape)


COUNTS = [40, 0, 3, 130]


def operands(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows [N, D], weights [E, D, F], other rows [N, F], and the ends of the experts."""
    generator = torch.Generator().manual_seed(1)
    sizes = ((sum(COUNTS), 64), (len(COUNTS), 64, 32), (sum(COUNTS), 32))
    a, weights, b = (torch.randn(*size, generator=generator).to(dtype) for size in sizes)
    return a, weights, b, torch.tensor(COUNTS).cumsum(0).to(torch.int32)


def counted_products(a: torch.Tensor, weights: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both kinds of product in fp64, with each expert's rows quantized alone."""
    of_weights = numbers_of(weights.transpose(1, 2)).transpose(1, 2)
    groups = zip(a.split(COUNTS), b.split(COUNTS), of_weights, strict=True)
    rows = []
    gradients = []
    for own_a, own_b, own_weights in groups:
        rows.append(numbers_of(own_a) @ own_weights)
        left, right = (numbers_of(F.pad(own, (0, 0, 0, -len(own) % 32)).t()) for own in (own_a, own_b))
        gradients.append(left @ right.t())
    return torch.cat(rows), torch.stack(gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_kinds_of_product_equal_fp64_products_of_the_numbers(dtype):
    a, weights, b, ends = operands(dtype)
    expected_rows, expected_gradients = counted_products(a, weights, b)
    rows = mxfp8_mm(a, weights, ends, emulated_product)
    gradients = mxfp8_mm(a.t(), b, ends, emulated_product)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-8, "atol": 1e-5}
    assert rows.dtype == gradients.dtype == dtype
    torch.testing.assert_close(rows.double(), expected_rows, **tolerance)
    torch.testing.assert_close(gradients.double(), expected_gradients, **tolerance)
    assert not gradients[1].any()


def test_all_but_the_product_of_the_card_runs_here():
    """PyTorch checks sizes, strides and types, and a stand-in reads scales where a card would."""
    a, weights, b, ends = operands(torch.bfloat16)
    with blackwell.anywhere() as calls:
        for left, right in ((a, weights), (a.t(), b)):
            ours = mxfp8_mm(left, right, ends, mxfp8.card_product)
            expected = mxfp8_mm(left, right, ends, emulated_product)
            torch.testing.assert_close(ours, expected, rtol=2**-7, atol=1e-5)
    assert calls == [(4, 64, 32), (64, 32)]


def random_experts(seed: int, tokens: int, dtype: torch.dtype = torch.float32):
    """Map, upstream gradient and the four inputs that have gradients."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((tokens, 64), (3, 64, 64), (3, 64, 32), (tokens, 64))
    x, up, down, upstream = (torch.randn(*size, generator=generator).to(dtype) for size in sizes)
    routing_map = torch.rand(tokens, 3, generator=generator) < 0.6
    gates = torch.rand(tokens, 3, generator=generator) * routing_map
    return routing_map, upstream, [x, gates, 0.2 * up, 0.2 * down]


class _Rounded(torch.autograd.Function):
    """A product of an expert with operands in MXFP8, also in its gradients."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return (numbers_of(x) @ numbers_of(weight).t()).float()

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        padded_x, padded_grad = (F.pad(rows, (0, 0, 0, -len(rows) % 32)).t() for rows in (x, grad))
        of_x = numbers_of(grad) @ numbers_of(weight.t()).t()
        return of_x.float(), (numbers_of(padded_grad) @ numbers_of(padded_x).t()).float()


def rounded_experts(x, gates, routing_map, up, down):
    """The experts by a loop over them, with each product rounded by :class:`_Rounded`."""
    y = torch.zeros_like(x)
    for expert in range(len(up)):
        (tokens,) = routing_map[:, expert].nonzero(as_tuple=True)
        if len(tokens):
            h1, h2 = _Rounded.apply(x[tokens], up[expert]).chunk(2, dim=1)
            activation = F.silu(h1) * h2 * gates[tokens, expert, None]
            y = y.index_add(0, tokens, _Rounded.apply(activation, down[expert]))
    return y


@pytest.mark.parametrize("tokens", [5, 70])
def test_output_and_all_gradients_equal_experts_whose_operands_are_rounded(tokens):
    routing_map, upstream, leaves = random_experts(tokens, tokens)
    permutation = EMULATED.permutation(routing_map)
    ours = with_gradients(lambda *a: routed_experts(*a, permutation, EMULATED), leaves, upstream)
    expected = with_gradients(lambda x, g, u, d: rounded_experts(x, g, routing_map, u, d), leaves, upstream)
    plain = with_gradients(lambda x, g, u, d: oracles.moe_output(x, g, routing_map, u, d), leaves, upstream)
    for name, value, reference, exact in zip(("y", "x", "gates", "up", "down"), ours, expected, plain, strict=True):
        error = (value - reference).norm() / reference.norm()
        off = (value - exact).norm() / exact.norm()
        assert error < 2e-3, name  # a rounding of fp32 can move an element to the next number
        assert 5e-3 < off < 0.1, name  # it does round


def test_a_cpu_takes_no_shorter_way_around_the_products():
    """One token, inference, and sums of gradients."""
    routing_map, upstream, leaves = random_experts(0, 1)
    routing_map[:] = True
    permutation = Permutation.of(routing_map)
    with torch.no_grad():
        y = routed_experts(*leaves, permutation, EMULATED)
    torch.testing.assert_close(y, rounded_experts(*leaves[:2], routing_map, *leaves[2:]), rtol=2e-3, atol=2e-3)
    inputs = [leaf.clone().requires_grad_() for leaf in leaves]
    for _ in range(2):
        routed_experts(*inputs, permutation, EMULATED).backward(upstream)
    once = with_gradients(lambda *a: routed_experts(*a, permutation, EMULATED), leaves, upstream)
    for leaf, gradient in zip(inputs, once[1:], strict=True):
        torch.testing.assert_close(leaf.grad, 2 * gradient)


def refusal(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> str:
    pick_backend.cache_clear()
    with pytest.raises(ConfigError) as refused:
        pick_backend("mxfp8", device, dtype)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_cpu_and_other_cards_are_refused(monkeypatch):
    assert refusal(CPU) == (
        "train.moe_backend='mxfp8': does not run on cpu; use auto, or mxfp8_emulated, which is slow, to see its effect"
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    for capability in ((9, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        card = ".".join(map(str, capability))
        assert refusal(torch.device("cuda")) == (
            "train.moe_backend='mxfp8': requires data center Blackwell (compute capability 10), not NVIDIA H200 "
            f"(compute capability {card}); use auto"
        )


@pytest.fixture
def _blackwell(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA B200")
    difference = mxfp8._difference_from_emulation
    monkeypatch.setattr(mxfp8, "_difference_from_emulation", lambda device: difference(CPU))


@pytest.mark.usefixtures("_blackwell")
def test_a_card_whose_product_is_missing_or_wrong_is_refused(monkeypatch):
    device = torch.device("cuda")
    assert "does not compute in float32; use train.precision=bf16, or auto" in refusal(device, torch.float32)
    said = refusal(device)  # this build has no such product
    assert "cannot multiply on NVIDIA B200: Could not run 'aten::_scaled_grouped_mm_v2'" in said
    with blackwell.anywhere():
        assert pick_backend("mxfp8", device, torch.bfloat16).name == "mxfp8"
        monkeypatch.setattr(mxfp8, "row_scales", lambda scales, of=row_scales: of(scales.flip(-1)))
        assert "differs from its emulation by" in refusal(device)
    pick_backend.cache_clear()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
def test_on_a_card_with_mxfp8_experts_agree_with_their_emulation():
    """The call of PyTorch's product, which runs nowhere else. The stand-in of the other tests is not it."""
    device = torch.device("cuda")
    if torch.cuda.get_device_capability(device)[0] != 10:
        pytest.skip("needs data center Blackwell (compute capability 10)")
    routing_map, upstream, leaves = random_experts(2, 700, torch.bfloat16)
    leaves[1] = leaves[1].float()
    leaves = [leaf.to(device) for leaf in leaves]
    results = []
    for name in ("mxfp8", "mxfp8_emulated"):
        backend = pick_backend(name, device, torch.bfloat16)
        permutation = backend.permutation(routing_map.to(device))
        compute = lambda *a, p=permutation, b=backend: routed_experts(*a, p, b)  # noqa: E731
        results.append(with_gradients(compute, leaves, upstream.to(device)))
    for ours, expected in zip(*results, strict=True):
        assert (ours.float() - expected.float()).norm() <= 2e-2 * expected.float().norm()
