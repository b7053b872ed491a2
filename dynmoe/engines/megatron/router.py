"""Our routers in Megatron-Core's own MoE layer, for a training that keeps its layer, dispatchers and loop.

``MoESubmodules.router`` takes a :class:`DynamicRouter`; :func:`with_router` puts one into a layer spec. With
Megatron-LM: ``--spec dynmoe.engines.megatron.router top_p_spec``, or a spec of your own made by :func:`layer_spec`.

The stock layer carries any number of experts per token as probabilities and a boolean map [T, E]. What counts
``moe_router_topk`` in its place is refused by name (:func:`check_config`). A budget, adaptation and capacity act
between steps and need ``engine=megatron``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_layer import HAVE_TE
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, get_default_pg_collection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import make_sharded_tensor_for_checkpoint
from torch import Tensor, nn

from dynmoe.config import ModelConfig
from dynmoe.config.routing import MoEConfig, RouterConfig
from dynmoe.engines.megatron import versions
from dynmoe.engines.megatron.stock_config import check_config, say_what_is_dropped
from dynmoe.errors import UserError
from dynmoe.moe import MoEContext
from dynmoe.moe.routers import ThresholdRouter, make_router
from dynmoe.moe.statistics import LayerStatistics, PassStatistics, record, weighted_sum


class DynamicRouter(MegatronModule):
    """A router for ``MoESubmodules.router``: hidden states to probabilities fp32 [T, E] and a boolean map [T, E].

    Args:
        config: Megatron's.
        pg_collection: its process groups; the default ones where there are none.
        settings: kind of router and its coefficients, as under ``model.router`` in our configuration.
        seed: of the initial weights, which depend on it and on the layer alone.

    Raises:
        UserError: a setting that does not go with a dynamic number of experts.
    """

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
        *,
        settings: RouterConfig,
        seed: int = 0,
    ) -> None:
        super().__init__(config)
        check_config(config, settings)
        say_what_is_dropped(config)
        groups = get_default_pg_collection() if pg_collection is None else pg_collection
        self.context = MoEContext(token_group=groups.tp_dp_cp if dist.get_world_size(groups.tp_dp_cp) > 1 else None)
        # Megatron adds gradients up over tensor-parallel ranks, and multiplies losses by the context-parallel size.
        self._share = 1.0 / dist.get_world_size(groups.tp_cp)
        self._expert_parallel = dist.get_world_size(groups.ep)
        self._seed = seed
        self._layers_before = config.num_layers if is_mtp_layer else 0  # those of multi-token prediction count anew
        self._is_new, self._repeats = True, 0
        self._statistics: Tensor | None = None
        self._latest: PassStatistics | None = None
        self.model = _model_config(config, settings)
        self.set_layer_number(1)

    def set_layer_number(self, layer_number: int) -> None:
        """Draws the weights of layer ``layer_number`` (from 1 on); Megatron calls it before anything uses them."""
        self.layer = self._layers_before + layer_number - 1
        name = f"layers.{self.layer}.moe.router"
        self.router = make_router(self.model, self.model.moe.experts, self._seed, name, self.context)
        self.router.to(device=torch.cuda.current_device() if torch.cuda.is_available() else "cpu")
        self.router.to(self.config.params_dtype)
        for parameter in self.router.parameters():
            parameter.sequence_parallel = self.config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden_states: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Hidden states [..., D] of this rank."""
        if padding_mask is not None:
            raise UserError("padding_mask: a dynamic router counts every token; pack sequences without padding")
        if versions.is_traced():
            raise UserError(
                "init_moe_router_tracer: it leaves out layers whose number of experts varies; use take_figures, or "
                "engine=megatron with logging.trace_interval"
            )
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        self._calibrate(x_TD)
        plan = self.router(x_TD)
        gates_TE = plan.gates_TE
        self._add_latest()
        losses, coefficients = self.router.losses(plan) if self.training else {}, self.router.loss_coefficients
        self.context.start_counts()
        if losses and torch.is_grad_enabled():
            gates_TE = MoEAuxLossAutoScaler.apply(gates_TE, weighted_sum(losses, coefficients) * self._share)
        if self.training and not self._is_repetition():
            self._latest = record(plan, losses, coefficients, self.router.control, self.router.active_E)
        return gates_TE, plan.routing_map_TE

    def _add_latest(self) -> None:
        """Adds what the latest pass recorded: by now its counts have come from the other ranks."""
        if self._latest is not None:
            self.router.wait_for_counts()
            seen, self._latest = self._latest.vector(), None
            self._statistics = seen if self._statistics is None else self._statistics + seen

    @torch.no_grad()
    def _calibrate(self, x_TD: Tensor) -> None:
        """Sets thresholds from the scores of the first pass in training, where the settings ask for it."""
        if self._is_new and self.training and isinstance(self.router, ThresholdRouter):
            self.context.calibrating = True
            self.router.route(x_TD)
            self.context.calibrating = False
        self._is_new = self._is_new and not self.training

    def _is_repetition(self) -> bool:
        """Whether this pass repeats one (activation recomputation), of which the first has no gradients."""
        if not torch.is_grad_enabled():
            self._repeats += 1
            return False
        repeats = self._repeats > 0
        self._repeats -= int(repeats)
        return repeats

    def take_figures(self) -> dict[str, float]:
        """Experts per token, load and losses since the last call, over all ranks, by the names of our metrics.

        Collective over the ranks that share the layer's tokens. Empty where nothing was trained.
        """
        self._add_latest()
        if self._statistics is None:
            return {}
        vector, self._statistics = self._statistics, None
        if self.context.token_group is not None:
            dist.all_reduce(vector, group=self.context.token_group)
        return LayerStatistics(vector.cpu(), self.model, 0).figures(self._expert_parallel)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Weights and state as copies on all ranks."""
        return {
            f"{prefix}{name}": make_sharded_tensor_for_checkpoint(tensor, f"{prefix}{name}", sharded_offsets)
            for name, tensor in self.state_dict(keep_vars=True).items()
        }


def _model_config(config: TransformerConfig, settings: RouterConfig) -> ModelConfig:
    """What a router asks of our configuration."""
    moe = MoEConfig(experts=config.num_moe_experts)
    size = config.hidden_size
    return ModelConfig(
        layers=1, hidden=size, heads=1, kv_heads=1, init_std=config.init_method_std, moe=moe, router=settings
    )


def with_router(spec: Any, settings: RouterConfig, seed: int = 0) -> Any:
    """A copy of a spec whose stock MoE layers have a dynamic router; what is not changed, both share.

    Args:
        spec: of a layer, of a block (``TransformerBlockSubmodules``) or of a HybridModel's stack.
        settings: see :class:`DynamicRouter`, as ``seed``.
    """
    router = functools.partial(DynamicRouter, settings=settings, seed=seed)
    if isinstance(spec, TransformerBlockSubmodules):
        routed = [versions.with_router(layer, router) for layer in spec.layer_specs]
        layers = [new or layer for new, layer in zip(routed, spec.layer_specs, strict=True)]
        found = dataclasses.replace(spec, layer_specs=layers) if any(routed) else None
    elif hasattr(spec.submodules, "moe_layer"):
        layer = versions.with_router(spec.submodules.moe_layer, router)
        parts = dataclasses.replace(spec.submodules, moe_layer=layer)
        found = dataclasses.replace(spec, submodules=parts) if layer else None
    else:
        found = versions.with_router(spec, router)
    if found is None:
        raise UserError("with_router: the spec has no MoELayer of Megatron-Core; give num_experts when you make it")
    return found


def layer_spec(settings: RouterConfig, seed: int = 0) -> ModuleSpec:
    """Megatron's layer spec, of Transformer Engine where it is installed, with a dynamic router in every layer."""
    if HAVE_TE:
        spec = get_gpt_layer_with_transformer_engine_spec(num_experts=1, moe_grouped_gemm=True)
    else:
        spec = get_gpt_layer_local_spec(num_experts=1, normalization="RMSNorm")
    return with_router(spec, settings, seed)


def take_figures(chunks: Sequence[nn.Module]) -> dict[int, dict[str, float]]:
    """By layer index what each dynamic router of this rank has seen since the last call; see ``take_figures`` there."""
    return {router.layer: router.take_figures() for router in _routers(chunks)}


def _routers(chunks: Sequence[nn.Module]) -> Iterator[DynamicRouter]:
    for chunk in chunks:
        yield from (module for module in chunk.modules() if isinstance(module, DynamicRouter))


# For Megatron-LM's --spec, which takes the name of a spec.
top_p_spec = layer_spec(RouterConfig(kind="top_p"))
top_any_spec = layer_spec(RouterConfig(kind="top_any", form="improved"))
