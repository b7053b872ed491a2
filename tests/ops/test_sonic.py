"""The backend over SonicMoE: what it refuses, what it hands over, and, where the package runs, what it computes."""

from __future__ import annotations

import ast
import inspect
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynmoe.errors import ConfigError
from dynmoe.moe import MoEContext, MoELayer
from dynmoe.ops import Permutation, pick_backend, routed_experts, sonic
from dynmoe.ops.sonic import SonicBackend, load_sonic, padded_rows
from harness import sonic as package
from harness.plans import Shape, spread_plan
from tests import oracles
from tests.moe.cases import HIDDEN, ROUTERS, run_layer, spread_router, tiny_model
from tests.ops.test_routed_experts import random_case, with_gradients

GPU = torch.device("cuda")


def refusal_of(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> str:
    with pytest.raises(ConfigError) as refused:
        load_sonic(device, dtype)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.fixture
def _installed(monkeypatch):
    monkeypatch.setattr(sonic, "find_spec", lambda name: name == "sonicmoe")


@pytest.fixture
def _hopper(monkeypatch, _installed):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


@pytest.mark.skipif(find_spec("sonicmoe") is not None, reason="sonic-moe is installed")
def test_it_must_be_installed():
    said = refusal_of(GPU)
    assert said == "train.moe_backend='sonic': requires sonic-moe, which is not installed; install it, or use auto"
    with pytest.raises(ConfigError, match="not installed"):
        pick_backend("sonic", torch.device("cpu"), torch.float32)


@pytest.mark.usefixtures("_installed")
def test_a_cpu_and_an_old_card_are_refused(monkeypatch):
    assert refusal_of(torch.device("cpu")).endswith("does not run on cpu; use auto")
    for capability in ((8, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        card = ".".join(map(str, capability))
        assert refusal_of(GPU).endswith(f"not a card of compute capability {card}; use auto")


@pytest.mark.usefixtures("_hopper")
def test_fp32_is_refused():
    assert "does not compute in float32; use train.precision=bf16, or auto" in refusal_of(GPU, torch.float32)


@pytest.mark.usefixtures("_hopper")
def test_a_package_that_cannot_be_imported_or_is_too_old_is_refused(monkeypatch):
    def missing(name: str) -> ModuleType:
        raise ImportError(f"No module named 'quack' ({name})")

    monkeypatch.setattr(sonic, "import_module", missing)
    assert "cannot be imported: No module named 'quack' (sonicmoe); install what it requires" in refusal_of(GPU)
    old = package.stand_in()
    old.moe_general_routing_inputs = lambda x, router_scores: None  # type: ignore[attr-defined]
    monkeypatch.setattr(sonic, "import_module", lambda name: old)
    assert "has no concat_layout; install 0.1.2 or later, or use auto" in refusal_of(GPU)
    monkeypatch.setattr(sonic, "import_module", lambda name: package.stand_in())
    assert load_sonic(GPU, torch.bfloat16).__name__ == "sonicmoe"


def test_widths_that_do_not_begin_at_16_bytes_are_refused():
    routing_map, _, (x, gates, up, down) = random_case(0, 3, 2, 0.7)
    backend = SonicBackend(package.stand_in())
    permutation = backend.permutation(routing_map)
    cure = r"model.moe.expert_hidden is 4; use multiples of 8, or auto"
    with pytest.raises(ConfigError, match=cure):
        routed_experts(x, gates, up[:, :8], down[:, :, :4], permutation, backend)


def test_auto_never_picks_it():
    with package.sonic_anywhere():
        assert pick_backend("auto", torch.device("cpu"), torch.bfloat16).name == "grouped_mm"
        assert pick_backend("sonic", torch.device("cpu"), torch.bfloat16).name == "sonic"


@given(st.integers(0, 10**6), st.integers(0, 9), st.integers(1, 5), st.sampled_from([0.0, 0.3, 0.7, 1.0]))
def test_output_and_all_gradients_equal_a_loop_over_tokens(seed, tokens, experts, density):
    """With tokens of no, one and several experts, and experts and batches without tokens."""
    routing_map, upstream, leaves = random_case(seed, tokens, experts, density)
    backend = SonicBackend(package.stand_in())
    permutation = Permutation.of(routing_map)
    ours = with_gradients(lambda *a: routed_experts(*a, permutation, backend), leaves, upstream)
    oracle = with_gradients(
        lambda x, gates, up, down: oracles.moe_output(x, gates, routing_map, up, down), leaves, upstream
    )
    for value, expected, what in zip(ours, oracle, ("y", "x", "gates", "w_up", "w_down"), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5, msg=lambda m, w=what: f"{w}: {m}")


def test_weights_have_gradients_even_if_no_token_came():
    """Engines reduce the gradient of every weight."""
    routing_map, _, leaves = random_case(0, 0, 3, 0.5)
    inputs = [leaf.requires_grad_() for leaf in leaves]
    backend = SonicBackend(package.stand_in())
    routed_experts(*inputs, Permutation.of(routing_map), backend).sum().backward()
    assert all(leaf.grad is not None and not leaf.grad.any() for leaf in inputs)


def test_weights_are_not_copied():
    routing_map, _, (x, gates, up, down) = random_case(0, 3, 2, 0.7)
    given_to_it = []
    stand_in = package.stand_in()
    compute = stand_in.moe_general_routing_inputs

    def look(x, scores, token, expert, w1, b1, w2, *others, **options):
        given_to_it.extend([w1.data_ptr(), w2.data_ptr()])
        return compute(x, scores, token, expert, w1, b1, w2, *others, **options)

    stand_in.moe_general_routing_inputs = look  # type: ignore[attr-defined]
    backend = SonicBackend(stand_in)
    routed_experts(x, gates, up, down, backend.permutation(routing_map), backend)
    assert given_to_it == [up.data_ptr(), down.data_ptr()]


def test_padded_rows_have_few_sizes_and_cost_little():
    sizes = {padded_rows(n) for n in range(1, 200_001)}
    assert len(sizes) < 150
    assert padded_rows(0) == 128  # an expert's product needs a row
    for n in (1, 2047, 2049, 32_768, 65_537, 196_608, 199_999):
        assert 0 <= padded_rows(n) - n < max(128, n / 16)


def test_routes_that_pad_are_spread_over_tokens_and_experts():
    routing_map = torch.ones(600, 5, dtype=torch.bool)
    _, _, leaves = random_case(0, 600, 5, 1.0)
    route_M, gates_M = sonic._routes_by_token(leaves[1] + 1, Permutation.of(routing_map))
    assert len(route_M) == padded_rows(3000) == 3072
    (spare,) = (gates_M == 0).nonzero(as_tuple=True)
    assert len(spare) == 72
    assert (route_M[spare] // 5).unique(return_counts=True)[1].max() == 1
    assert (route_M[spare] % 5).bincount().max() == 15


@pytest.mark.parametrize("kind", sorted(ROUTERS))
def test_the_whole_layer(kind):
    results = []
    with package.sonic_anywhere():
        for name in ("sonic", "grouped_mm"):
            layer = MoELayer(tiny_model(*ROUTERS[kind], "model.hidden=16"), 0, 0, MoEContext(backend=name))
            spread_router(layer)
            generator = torch.Generator().manual_seed(0)
            x, upstream = (torch.randn(24, HIDDEN, generator=generator) for _ in range(2))
            results.append(run_layer(layer, x, upstream))
    for name, expected in results[1].items():
        torch.testing.assert_close(results[0][name], expected, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_the_stand_in_has_the_signature_of_the_package():
    """Read from its source, because it cannot be imported without a GPU."""
    found = find_spec("sonicmoe")
    if found is None or found.origin is None:
        pytest.skip("sonic-moe is not installed")
    tree = ast.parse((Path(found.origin).parent / "functional" / "__init__.py").read_text())
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    (theirs,) = (node.args for node in functions if node.name == "moe_general_routing_inputs")
    ours = inspect.signature(package.moe_general_routing_inputs).parameters
    assert [argument.arg for argument in theirs.args] == list(ours)
    defaults = [p.default for p in ours.values() if p.default is not inspect.Parameter.empty]
    assert [ast.literal_eval(value) for value in theirs.defaults] == defaults


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
@pytest.mark.parametrize("imbalance", [1.0, 6.0])
def test_on_a_gpu_it_agrees_with_a_loop(imbalance):
    pytest.importorskip("sonicmoe", reason="sonic-moe is not installed")
    shape = Shape(2000, 512, 256, 8)
    plan = spread_plan(shape, 1.2, imbalance)
    dtype = torch.bfloat16
    generator = torch.Generator("cuda").manual_seed(0)
    sizes = [(2000, 512), (8, 512, 512), (8, 512, 256)]
    x, up, down = (torch.randn(*s, device="cuda", generator=generator).div(16).to(dtype) for s in sizes)
    upstream = torch.randn(2000, 512, device="cuda", generator=generator).to(dtype)
    leaves = [x, plan.gates_TE, up, down]
    results = []
    for name in ("sonic", "loop"):
        backend = pick_backend(name, x.device, dtype)
        permutation = backend.permutation(plan.routing_map_TE)
        compute = lambda *a, p=permutation, b=backend: routed_experts(*a, p, b)  # noqa: E731
        results.append(with_gradients(compute, leaves, upstream))
    for ours, expected in zip(*results, strict=True):
        assert ours.dtype == expected.dtype
        assert (ours.float() - expected.float()).norm() <= 2e-2 * expected.float().norm()
