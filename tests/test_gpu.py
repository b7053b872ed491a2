"""What only a GPU can show. Without one every test here is skipped, with that reason."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dynmoe.moe import MoEContext, MoELayer, StepState
from dynmoe.moe.trace import RoutingTrace
from dynmoe.ops import pick_backend, routed_experts
from harness.plans import Shape, spread_plan
from tests.moe.cases import HIDDEN, ROUTERS, run_layer, spread_router, tiny_model
from tests.ops.test_routed_experts import with_gradients

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")]


@pytest.mark.parametrize("kind", sorted(ROUTERS))
@pytest.mark.parametrize("tokens", [0, 1, 64])
def test_the_layer_in_bf16_agrees_with_fp32_on_the_cpu(kind, tokens):
    torch.manual_seed(0)
    x, upstream = torch.randn(tokens, HIDDEN).bfloat16(), torch.randn(tokens, HIDDEN).bfloat16()
    results = []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        layer = MoELayer(
            tiny_model(*ROUTERS[kind], "model.hidden=16"), 0, 0, MoEContext(step=StepState(recording=True))
        )
        spread_router(layer)
        layer.bfloat16().to(device, dtype)  # the same rounded weights on both
        results.append(run_layer(layer, x.to(device, dtype), upstream.to(device, dtype)))
    for name, exact in results[0].items():
        ours = results[1][name].cpu().float()
        assert (ours - exact).norm() <= 2e-2 * exact.norm() + 1e-6, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("window", "width"), [(None, 64), (200, 64), (None, 96)])
def test_flex_attention_agrees_with_attention_under_a_mask(dtype, window, width):
    """Also with values narrower than keys, as in latent attention."""
    from dynmoe.model.attention import causal_attention
    from dynmoe.model.documents import Documents

    torch.manual_seed(0)
    length = 700
    begins = torch.rand(2, length, device="cuda") < 0.01
    starts = torch.where(begins, torch.arange(length, device="cuda"), 0).cummax(dim=1).values
    mask = Documents(starts, length, starts.device).mask(window)
    q, upstream, k, v = (
        torch.randn(2, heads, length, size, device="cuda", dtype=dtype)
        for heads, size in ((4, width), (4, 64), (2, width), (2, 64))
    )
    results = [
        with_gradients(lambda *inputs, m=own: causal_attention(*inputs, m), [q, k, v], upstream)
        for own in (mask, mask.mask_B1QP)
    ]
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=2e-2, atol=2e-2 if dtype == torch.bfloat16 else 2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("experts", [5, 64])
def test_our_kernels_agree_with_a_loop_at_sizes_of_many_tiles(dtype, experts):
    torch.manual_seed(0)
    tokens, hidden, width = 2000, 392, 264
    plan = spread_plan(Shape(tokens, hidden, width, experts), 2.0, imbalance=2.0)
    gates = plan.gates_TE
    x, upstream = torch.randn(2, tokens, hidden, device="cuda", dtype=dtype).unbind()
    up = (torch.randn(experts, 2 * width, hidden, device="cuda") * hidden**-0.5).to(dtype)
    down = (torch.randn(experts, hidden, width, device="cuda") * width**-0.5).to(dtype)
    results = []
    for name, spare in (("triton", 0), ("triton", 700), ("loop", 0)):
        backend = pick_backend(name, x.device, dtype)
        permutation = backend.permutation(plan.routing_map_TE, 2 * tokens + spare)
        results.append(
            with_gradients(
                lambda *a, p=permutation, b=backend: routed_experts(*a, p, b), [x, gates, up, down], upstream
            )
        )
    for exact, padded, expected in zip(*results, strict=True):
        assert torch.equal(exact, padded)
        limit = 2e-2 if dtype == torch.bfloat16 else 1e-5
        assert (exact.float() - expected.float()).norm() <= limit * expected.float().norm()


def bounded_layer() -> tuple[MoELayer, torch.Tensor]:
    model = tiny_model(
        "model.hidden=64",
        "model.router.kind=top_p",
        "model.moe.max_mean_experts_per_token=3",
        "model.moe.on_overflow=drop",
    )
    layer = MoELayer(model, 0, 0, MoEContext()).to("cuda", torch.bfloat16)
    spread_router(layer)
    return layer, torch.randn(256, 64, device="cuda", dtype=torch.bfloat16)


def test_a_training_pass_with_a_limit_never_waits_for_the_gpu():
    layer, x = bounded_layer()
    layer(x).sum().backward()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x.requires_grad_()).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_traced_pass_never_waits_for_the_gpu():
    trace = RoutingTrace()
    model = tiny_model("model.hidden=64", "model.router.kind=top_k", "model.router.k=2")
    layer = MoELayer(model, 0, 0, MoEContext(step=StepState(trace=trace))).to("cuda", torch.bfloat16)
    x = torch.randn(256, 64, device="cuda", dtype=torch.bfloat16)
    layer(x)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    first, second = (own.sorted_routes() for own in trace.passes())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert len(second[0]) == 2 * 256


def test_a_pass_is_captured_in_a_cuda_graph_and_follows_its_input():
    layer, x = bounded_layer()
    upstream = torch.randn_like(x)
    inputs = x.clone().requires_grad_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            torch.autograd.grad(layer(inputs), inputs, upstream)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(inputs)
        (grad,) = torch.autograd.grad(y, inputs, upstream)
    for seed in range(3):
        torch.manual_seed(seed)
        fresh = torch.randn_like(x)
        with torch.no_grad():
            inputs.copy_(fresh)
        graph.replay()
        eager = fresh.clone().requires_grad_()
        expected = layer(eager)
        (expected_grad,) = torch.autograd.grad(expected, eager, upstream)
        assert torch.equal(y, expected)
        assert torch.equal(grad, expected_grad)


def test_both_engines_train_alike_in_bf16():
    """The smoke run with a small model; ``python -m bench gpu_smoke`` is the large one."""
    sizes = ["--layers", "4", "--hidden", "256", "--heads", "4", "--width", "256", "--length", "256", "--steps", "20"]
    done = subprocess.run(
        [sys.executable, "-m", "bench", "gpu_smoke", *sizes],
        capture_output=True, text=True, check=False, timeout=300, cwd=Path(__file__).parents[1],
        env={name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "losses of the two engines agree" in done.stdout


def stock_moe(dispatcher: str) -> torch.nn.Module:
    """Megatron's own MoE layer with top-p routing, weights by seed."""
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.spec_utils import build_module

    from dynmoe.config.parallel import ParallelConfig
    from dynmoe.engines.megatron.groups import make_groups, start_processes
    from dynmoe.engines.megatron.router import layer_spec
    from dynmoe.routers import TopP

    start_processes()
    make_groups(ParallelConfig(), seed=1)
    config = TransformerConfig(
        num_layers=1, hidden_size=1024, num_attention_heads=8, num_moe_experts=8, moe_ffn_hidden_size=512,
        add_bias_linear=False, gated_linear_unit=True, activation_func=torch.nn.functional.silu,
        normalization="RMSNorm", bias_dropout_fusion=False, gradient_accumulation_fusion=False,
        moe_token_dispatcher_type=dispatcher, moe_flex_dispatcher_backend="hybridep", bf16=True,
        params_dtype=torch.bfloat16,
    )  # fmt: skip
    layer = build_module(layer_spec(TopP(p=0.5)), config=config, layer_number=1)
    return layer.mlp.cuda()


def test_hybrid_ep_computes_what_the_all_to_all_dispatcher_does():
    """The two device calls that tests/engines/hybrid_ep.py stands in for, with a varying number of experts."""
    pytest.importorskip("deep_ep", reason="HybridEP is a package of its own: DeepEP, branch hybrid-ep")
    torch.manual_seed(0)
    x, upstream = (torch.randn(256, 1, 1024, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    results = []
    for dispatcher in ("alltoall", "flex"):
        layer, own = stock_moe(dispatcher), x.clone().requires_grad_()
        y, _ = layer(own)
        results.append((y, *torch.autograd.grad(y, own, upstream)))
    for ours, expected in zip(results[1], results[0], strict=True):
        assert (ours - expected).norm() <= 2e-2 * expected.norm()
