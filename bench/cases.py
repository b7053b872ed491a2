"""Layers, routing maps and methods shared by the benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bench.timing import Passes, saved_bytes, time_passes
from dynmoe.config import ModelConfig, load_config
from dynmoe.config.constants import MXFP8_BACKENDS
from dynmoe.moe import MoEContext, MoELayer
from dynmoe.routers import TopP
from dynmoe.routing import RoutingPlan
from harness.memory import peak_bytes
from harness.plans import DEVICE, Shape

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_TOLERANCE = {"bf16": 3e-2, "fp32": 1e-5}
_TOLERANCE_MXFP8 = 0.15


@dataclass(frozen=True)
class Method:
    """A way to compute a layer, from tokens [T, D] to outputs [T, D]."""

    name: str
    module: nn.Module
    forward: Callable[[Tensor], Tensor]
    same_routing: bool = True

    def timed(self, x_TD: Tensor, upstream_TD: Tensor) -> Callable[[], Passes]:
        """Runs one forward and backward pass with fresh gradients."""

        def run() -> Passes:
            self.module.zero_grad()
            leaf = x_TD.detach().requires_grad_()
            return time_passes(lambda: self.forward(leaf), lambda y: y.backward(upstream_TD))

        return run

    def step(self, x_TD: Tensor, upstream_TD: Tensor) -> None:
        """Runs one forward and backward pass; gradients add up."""
        self.forward(x_TD.detach().requires_grad_()).backward(upstream_TD)

    def memory(self, x_TD: Tensor, upstream_TD: Tensor) -> dict[str, int]:
        """Returns the bytes saved for the backward pass, and the peak increase of memory during both passes.

        The peak of the first passes of a step includes the gradients of the weights, which are new. In further ones
        these are there, and what is added to them counts only where a method allocates it.
        """
        saved = saved_bytes(lambda: self.forward(x_TD.detach().requires_grad_()), self.module)
        self.step(x_TD, upstream_TD)  # warms up
        self.module.zero_grad()
        first, further = (peak_bytes(lambda: self.step(x_TD, upstream_TD)) for _ in range(2))
        return {"saved_bytes": saved, "peak_bytes": first, "further_peak_bytes": further}


def check(dtype: str, methods: Sequence[Method], x_TD: Tensor) -> None:
    """Checks that with the same routing every method has the first one's output and gradient of the tokens.

    Our whole layer also has the gradient of its router and losses, which is not compared.

    Raises:
        SystemExit: names the method that differs.
    """
    expected: list[Tensor] = []
    for method in methods:
        leaf = x_TD.detach().requires_grad_()
        output = method.forward(leaf)
        compared = [output.detach().float()]
        if method.name != "dynmoe":
            output.backward(torch.ones_like(output))
            assert leaf.grad is not None
            compared.append(leaf.grad.float())
        expected = expected if len(expected) == 2 else compared
        for ours, value in zip(expected, compared, strict=False):
            error = ((value - ours).norm() / ours.norm()).item()
            limit = _TOLERANCE_MXFP8 if method.name in MXFP8_BACKENDS else _TOLERANCE[dtype]
            if not error <= limit:
                raise SystemExit(f"{dtype}: {method.name} differs from {methods[0].name} by {error:.1e}; no timings")
    names = ", ".join(method.name for method in methods[1:])
    print(f"{dtype}: {methods[0].name} agrees with {names} under the same routing")


class FixedRouter(nn.Module):
    """Gives our layer a fixed plan, whose gates have a gradient, without auxiliary losses."""

    def __init__(self, plan: RoutingPlan) -> None:
        super().__init__()
        self.plan = plan
        self.spec = TopP().resolved
        self.loss_coefficients: dict[str, float] = {}
        self.gates_TE = nn.Parameter(plan.gates_TE.detach().clone())

    def forward(self, *_: object) -> RoutingPlan:
        return replace(self.plan, gates_TE=self.gates_TE)

    def losses(self, *_: object) -> dict[str, Tensor]:
        return {}


def model_config(shape: Shape, *overrides: str) -> ModelConfig:
    sizes = [
        f"model.hidden={shape.hidden}", "model.heads=1", "model.kv_heads=1", f"model.moe.experts={shape.experts}",
        f"model.moe.expert_hidden={shape.width}", "model.router.kind=top_p",
    ]  # fmt: skip
    return load_config(None, [*sizes, *overrides]).model


def make_layer(shape: Shape, dtype: str, plan: RoutingPlan | None = None, backend: str = "auto") -> MoELayer:
    """Our layer, with its own router or a fixed plan."""
    layer = MoELayer(model_config(shape), 0, 0, MoEContext(backend=backend)).to(DEVICE, DTYPES[dtype])
    if plan is not None:
        layer.router = FixedRouter(plan)  # type: ignore[assignment]
    return layer


def calibrate(layer: MoELayer, mean_k: float, x_TD: Tensor) -> None:
    """Spreads the router's scores and sets p so that ``x_TD`` gets ``mean_k`` experts per token."""
    router = layer.router
    spec = router.spec
    assert isinstance(spec, TopP)
    with torch.no_grad():
        router.get_parameter("weight_ED").normal_(0.0, 2.0 / x_TD.shape[1] ** 0.5)
        spec.fit(router, spec.logits_TE(router, x_TD), mean_k)


def dense_floor(plan: RoutingPlan, w_up_EHD: Tensor, w_down_EDF: Tensor) -> Callable[[], Passes]:
    """The six matrix products that any method needs, as dense products over as many rows as the plan has routes."""
    num_rows = int(plan.routing_map_TE.sum())
    w_up_HD, w_down_DF = (w_up_EHD[0], w_down_EDF[0])
    x_ND, h_NH, a_NF = (
        torch.randn(num_rows, width, device=w_up_HD.device, dtype=w_up_HD.dtype)
        for width in (w_up_HD.shape[1], w_up_HD.shape[0], w_down_DF.shape[1])
    )
    grad_ND = torch.randn_like(x_ND)

    def forward() -> Tensor:
        x_ND @ w_up_HD.t()
        return a_NF @ w_down_DF.t()

    def backward(_: Tensor) -> None:
        grad_ND @ w_down_DF, grad_ND.t() @ a_NF, h_NH @ w_up_HD, h_NH.t() @ x_ND

    return lambda: time_passes(forward, backward)


def tokens_of(shape: Shape, dtype: str) -> tuple[Tensor, Tensor]:
    """Tokens, and the gradient of the output."""
    torch.manual_seed(0)
    x_TD = torch.randn(shape.tokens, shape.hidden, device=DEVICE, dtype=DTYPES[dtype])
    return x_TD, torch.randn_like(x_TD)


def routing_facts(plan: RoutingPlan) -> dict[str, Any]:
    """K, its spread, and the factor on rows if every expert were padded to the fullest one."""
    experts_T = plan.experts_per_token_T.float()
    load_E = plan.tokens_per_expert_E.float()
    return {
        "mean_k": round(experts_T.mean().item(), 3),
        "std_k": round(experts_T.std().item(), 3),
        "padding": round((load_E.max() * len(load_E) / load_E.sum()).item(), 3),
    }
