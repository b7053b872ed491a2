"""Our kernels against the loop over tokens: in Triton's interpreter, or compiled where there is a GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynmoe.moe import MoEContext, MoELayer
from dynmoe.ops import Permutation, pick_backend, routed_experts
from dynmoe.ops.triton import backend as triton_backend
from dynmoe.ops.triton.combine import sum_rows
from dynmoe.ops.triton.routes import build_routes
from tests import oracles
from tests.moe.cases import HIDDEN, ROUTERS, run_layer, spread_router, tiny_model
from tests.ops.test_routed_experts import DEVICE, random_case, with_gradients

few = settings(max_examples=8)


@few
@given(
    st.integers(0, 10**6), st.integers(0, 40), st.integers(1, 9), st.sampled_from([0.0, 0.3, 1.0]), st.integers(0, 5)
)
def test_routes_equal_those_of_pytorch(seed, tokens, experts, density, spare):
    routing_map, _, _ = random_case(seed, tokens, experts, density)
    expected = Permutation.of(routing_map)
    num_rows = int(routing_map.sum())
    ours = Permutation(*build_routes(routing_map, num_rows + spare))
    for name in ("token_N", "route_N", "row_N"):
        assert torch.equal(getattr(ours, name)[:num_rows].long(), getattr(expected, name)), name
    assert torch.equal(ours.token_offsets.long(), expected.token_offsets)
    assert torch.equal(ours.ends_E, expected.ends_E)


def test_many_tokens_make_several_tiles_of_the_map():
    routing_map = (torch.rand(3000, 5, generator=torch.Generator().manual_seed(0)) < 0.3).to(DEVICE)
    expected = Permutation.of(routing_map)
    ours = build_routes(routing_map, int(routing_map.sum()))
    assert torch.equal(ours[0].long(), expected.token_N)
    assert torch.equal(ours[2].long(), expected.row_N)


@few
@given(
    st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 5), st.sampled_from([0.0, 0.3, 1.0]), st.integers(0, 3),
    st.sampled_from([16, 32]),
)  # fmt: skip
def test_output_and_all_gradients_equal_a_loop_over_tokens(seed, tokens, experts, density, spare, rows_of_a_tile):
    routing_map, upstream, leaves = random_case(seed, tokens, experts, density)
    permutation = Permutation(*build_routes(routing_map, int(routing_map.sum()) + spare))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_backend, "_ROW_TILES", ((0, rows_of_a_tile),))
        backend = pick_backend("triton", DEVICE, torch.float32)
        ours = with_gradients(lambda *a: routed_experts(*a, permutation, backend), leaves, upstream)
    oracle = with_gradients(
        lambda x, gates, up, down: oracles.moe_output(x, gates, routing_map, up, down), leaves, upstream
    )
    for value, expected, what in zip(ours, oracle, ("y", "x", "gates", "w_up", "w_down"), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5, msg=lambda m, w=what: f"{w}: {m}")


def assert_equals(reference, routing_map, hidden, width, dtype, generator):
    """Output and gradients on random inputs equal those of another backend within rounding."""
    tokens, experts = routing_map.shape
    shapes = [(tokens, hidden), (experts, 2 * width, hidden), (experts, hidden, width)]
    x, up, down = (torch.randn(*shape, generator=generator).mul(0.2).to(DEVICE, dtype) for shape in shapes)
    gates = (torch.rand(tokens, experts, generator=generator) * routing_map).to(DEVICE)
    upstream = torch.randn(tokens, hidden, generator=generator).to(DEVICE, dtype)
    permutation = Permutation.of(routing_map.to(DEVICE))
    results = [
        with_gradients(
            lambda *a, n=name: routed_experts(*a, permutation, pick_backend(n, DEVICE, dtype)),
            [x, gates, up, down],
            upstream,
        )
        for name in ("triton", reference)
    ]
    for ours, expected in zip(*results, strict=True):
        assert ours.dtype == expected.dtype
        limit = 1e-5 if dtype == torch.float32 else 2e-3
        assert (ours.float() - expected.float()).norm() <= limit * expected.float().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sizes_that_fill_no_tile_and_more_than_one(dtype):
    """Half precision is fp16 here: the interpreter multiplies bf16 as if it were integers."""
    generator = torch.Generator().manual_seed(0)
    routing_map = torch.rand(50, 3, generator=generator) < 0.6
    routing_map[:, 1] = False  # an expert without tokens
    assert_equals("grouped_mm", routing_map, 136, 72, dtype, generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("aligned", [True, False])
def test_tiles_that_divide_sizes_need_no_masks(dtype, aligned):
    """Whole steps of the contractions, and a rest; in half precision by descriptors if rows begin at 16 bytes."""
    generator = torch.Generator().manual_seed(1)
    routing_map = torch.rand(90, 2, generator=generator) < 0.9
    assert_equals("loop", routing_map, 128, 64 if aligned else 67, dtype, generator)


def test_rows_past_those_in_use_are_never_read():
    """Buffers are longer than the number of rows, and hold arbitrary values."""
    routing_map, upstream, leaves = random_case(3, 20, 4, 0.4)
    num_rows = int(routing_map.sum())
    results = []
    allocate = torch.Tensor.new_empty

    def allocate_nan(like, *sizes, **options):
        return allocate(like, *sizes, **options).fill_(float("nan") if like.is_floating_point() else 10**9)

    for spare in (0, 20):
        permutation = Permutation(*build_routes(routing_map, num_rows + spare))
        for name in ("token_N", "route_N", "row_N"):
            getattr(permutation, name)[num_rows:] = 10**9
        backend = pick_backend("triton", DEVICE, torch.float32)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "new_empty", allocate_nan)
            results.append(
                with_gradients(lambda *a, p=permutation, b=backend: routed_experts(*a, p, b), leaves, upstream)
            )
    assert all(torch.equal(exact, padded) for exact, padded in zip(*results, strict=True))


def test_sums_of_rows_in_parts_of_the_width():
    routing_map = (torch.rand(6, 4, generator=torch.Generator().manual_seed(0)) < 0.5).to(DEVICE)
    permutation = Permutation.of(routing_map)
    rows = torch.randn(int(routing_map.sum()), 1500, device=DEVICE)
    expected = torch.zeros(6, 1500, device=DEVICE).index_add_(0, permutation.token_N, rows)
    torch.testing.assert_close(sum_rows(rows, permutation.row_N, permutation.token_offsets), expected)


@pytest.mark.parametrize("kind", sorted(ROUTERS))
def test_the_whole_layer_by_our_kernels(kind):
    results = []
    for name in ("triton", "grouped_mm"):
        layer = MoELayer(tiny_model(*ROUTERS[kind]), 0, 0, MoEContext(backend=name))
        spread_router(layer)
        layer.to(DEVICE)
        generator = torch.Generator().manual_seed(0)
        x, upstream = (torch.randn(24, HIDDEN, generator=generator).to(DEVICE) for _ in range(2))
        results.append(run_layer(layer, x, upstream))
    for name, expected in results[1].items():
        torch.testing.assert_close(results[0][name], expected, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_a_bound_of_the_rows_changes_nothing():
    """With a limit that is not reached, in every backend: only our kernels may see rows that are not there."""
    for name in ("triton", "grouped_mm", "loop"):
        results = []
        for limit in ([], ["model.moe.max_mean_experts_per_token=3.9"]):
            layer = MoELayer(tiny_model(*ROUTERS["top_p"], *limit), 0, 0, MoEContext(backend=name)).to(DEVICE)
            x = torch.randn(24, HIDDEN, generator=torch.Generator().manual_seed(0)).to(DEVICE)
            results.append(run_layer(layer, x, torch.ones_like(x)))
        assert all(torch.equal(value, results[1][key]) for key, value in results[0].items()), name


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU runs them")
def test_triton_without_gpu_and_interpreter_is_refused():
    import triton

    from dynmoe.errors import ConfigError

    pick_backend.cache_clear()
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = False
        with pytest.raises(ConfigError, match=r"train\.moe_backend='triton': does not run on cpu; use auto"):
            pick_backend("triton", DEVICE, torch.float32)
    with pytest.raises(ConfigError, match=r"train\.moe_backend='triton': does not run on cpu"):
        pick_backend("triton", DEVICE, torch.bfloat16)
    with pytest.raises(ConfigError, match=r"train\.moe_backend='cutlass': is not a known backend; use one of auto, "):
        pick_backend("cutlass", DEVICE, torch.float32)


def test_gates_of_any_layout_get_the_same_gradient():
    """As of a router that computes [E, T] and transposes."""
    routing_map, upstream, leaves = random_case(3, 7, 4, 0.5)
    permutation = Permutation(*build_routes(routing_map, int(routing_map.sum())))
    backend = pick_backend("triton", DEVICE, torch.float32)
    x, gates, up, down = leaves
    of_rows, of_columns = (
        with_gradients(lambda *a: routed_experts(*a, permutation, backend), [x, given, up, down], upstream)[2]
        for given in (gates, gates.t().contiguous().t())
    )
    assert torch.equal(of_columns, of_rows)


def test_pytorchs_own_setting_of_tf32_is_read():
    routing_map, upstream, leaves = random_case(3, 7, 4, 0.5)
    permutation = Permutation(*build_routes(routing_map, int(routing_map.sum())))
    launch = triton_backend._Launch(permutation, leaves[0])
    assert launch.precision == "ieee"
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        assert triton_backend._Launch(permutation, leaves[0]).precision == "tf32"
        backend = pick_backend("triton", DEVICE, torch.float32)
        with_gradients(lambda *a: routed_experts(*a, permutation, backend), leaves, upstream)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
