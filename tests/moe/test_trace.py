"""What a trace keeps of a layer is as large as its routes, whatever the number of experts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from dynmoe.moe import MoEContext, MoELayer, StepState
from dynmoe.moe.trace import RoutingTrace
from tests.moe.cases import HIDDEN, spread_router, tiny_model

TOKENS = 96
ROUTE = 4 + 4  # bytes of index and gate
COUNT = 4  # bytes of the number of routes


def tensors(own: object) -> Iterator[torch.Tensor]:
    """All that are reached from an object."""
    if isinstance(own, torch.Tensor):
        yield own
    elif isinstance(own, list | tuple):
        for part in own:
            yield from tensors(part)
    elif hasattr(own, "__dict__"):
        yield from tensors(list(vars(own).values()))


@pytest.mark.parametrize("experts", [4, 64])
@pytest.mark.parametrize(
    "router", [["kind=top_k", "k=2"], ["kind=top_p", "p=0.3"], ["kind=top_any"]], ids=["top_k", "top_p", "top_any"]
)
def test_bytes_follow_the_routes_and_not_the_experts(router, experts):
    model = tiny_model(f"model.moe.experts={experts}", *(f"model.router.{field}" for field in router))
    trace = RoutingTrace()
    routes = 0
    layer = MoELayer(model, 0, 0, MoEContext(step=StepState(trace=trace)))
    spread_router(layer)
    plans = []
    layer.router.register_forward_hook(lambda module, given, plan: plans.append(plan))
    for micro_batch in range(3):
        layer.context.step = StepState(trace=trace, micro_batch=micro_batch)
        layer(torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(micro_batch)))
        routes += int(plans[-1].routing_map_TE.sum())
    kept = sum(tensor.untyped_storage().nbytes() for tensor in tensors(trace))
    assert kept == routes * ROUTE + 3 * COUNT
    for own, plan in zip(trace.passes(), plans, strict=True):
        route_N, gates_N = own.sorted_routes()
        token_N, expert_N = plan.routing_map_TE.nonzero(as_tuple=True)
        assert route_N.tolist() == (token_N * experts + expert_N).tolist()
        assert torch.equal(gates_N, plan.gates_TE[token_N, expert_N])


def test_buffers_that_are_longer_than_the_routes_end_where_these_do():
    """Our kernels leave what lies behind them as it was; here a limit drops routes, and the rest fit its rows."""
    model = tiny_model(
        "model.router.kind=top_p", "model.moe.capacity_factor=0.5", "model.moe.max_mean_experts_per_token=3"
    )
    trace = RoutingTrace()
    layer = MoELayer(model, 0, 0, MoEContext(backend="triton", step=StepState(trace=trace)))
    spread_router(layer)
    plans = []
    dispatch = layer.dispatcher.dispatch
    layer.dispatcher.dispatch = lambda x_TD, plan, max_rows: (plans.append(plan), dispatch(x_TD, plan, max_rows))[1]
    layer(torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(0)))
    (own,), (plan,) = trace.passes(), plans
    assert len(own.route_N) == 3 * TOKENS > int(plan.routing_map_TE.sum())
    flat = plan.routing_map_TE.flatten().nonzero().flatten()
    assert own.sorted_routes()[0].tolist() == flat.tolist()
    assert torch.equal(own.sorted_routes()[1], plan.gates_TE.detach().flatten()[flat])
    dropped = (plan.selected_map_TE & ~plan.routing_map_TE).flatten().nonzero().flatten()
    assert own.dropped_M.tolist() == dropped.tolist() != []
