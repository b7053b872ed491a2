"""Our routers in Megatron-Core's own MoE layer, for runs that keep Megatron's layer, dispatchers and training loop.

``MoESubmodules.router`` takes a :class:`DynamicRouter`; :func:`with_router` puts one into a layer spec. With
Megatron-LM, use ``--spec dynmoe.engines.megatron.router top_p_spec``, or your own spec made by :func:`layer_spec`.

The stock layer supports any number of experts per token as probabilities and a boolean map [T, E]. Options that
assume ``moe_router_topk`` experts are refused by name (:func:`check_config`). Budget, adaptation and capacity run
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
from dynmoe.config.model import MoEConfig
from dynmoe.engines.megatron import versions
from dynmoe.engines.megatron.stock_config import check_config, warn_of_dropped_rows
from dynmoe.errors import UserError
from dynmoe.moe import MoEContext, MoEGroups
from dynmoe.moe.router import Router
from dynmoe.moe.statistics import LayerStatistics, PassStatistics, record, weighted_sum
from dynmoe.routers import RouterSpec, TopAny, TopP


class DynamicRouter(MegatronModule):
    """A router for ``MoESubmodules.router``: maps hidden states to fp32 probabilities and a boolean map, both [T, E].

    Args:
        config: Megatron's configuration.
        pg_collection: Megatron's process groups; the default groups if None.
        settings: router kind and coefficients, as under ``model.router`` in our configuration.
        seed: seed of the initial weights, which depend only on it and the layer.

    Raises:
        UserError: an option is incompatible with a dynamic number of experts.
    """

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
        *,
        settings: RouterSpec,
        seed: int = 0,
    ) -> None:
        super().__init__(config)
        check_config(config, settings)
        warn_of_dropped_rows(config)
        groups = get_default_pg_collection() if pg_collection is None else pg_collection
        tokens = groups.tp_dp_cp if dist.get_world_size(groups.tp_dp_cp) > 1 else None
        self.context = MoEContext(MoEGroups(tokens=tokens))
        # Megatron sums gradients over tensor-parallel ranks and multiplies losses by the context-parallel size.
        self._loss_scale = 1.0 / dist.get_world_size(groups.tp_cp)
        self._expert_parallel = dist.get_world_size(groups.ep)
        self._seed = seed
        self._layer_offset = config.num_layers if is_mtp_layer else 0  # MTP layers are numbered from 1 again
        self._needs_calibration = True
        self._expected_recomputations = 0
        self._statistics: Tensor | None = None
        self._pass_statistics: PassStatistics | None = None
        self.model = _model_config(config, settings)
        self.set_layer_number(1)

    def set_layer_number(self, layer_number: int) -> None:
        """Initializes the weights of layer ``layer_number`` (from 1); Megatron calls it before their first use."""
        self.layer = self._layer_offset + layer_number - 1
        name = f"layers.{self.layer}.moe.router"
        self.router = Router(self.model, self.model.moe.experts, self._seed, name, self.context)
        self.router.to(device=torch.cuda.current_device() if torch.cuda.is_available() else "cpu")
        self.router.to(self.config.params_dtype)
        for parameter in self.router.parameters():
            parameter.sequence_parallel = self.config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden_states: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Routes this rank's hidden states [..., D]."""
        if padding_mask is not None:
            raise UserError("padding_mask: not supported by a dynamic router; pack sequences without padding")
        if versions.is_router_traced():
            raise UserError(
                "init_moe_router_tracer: skips layers with a dynamic number of experts; use take_figures, or "
                "engine=megatron with logging.trace_interval"
            )
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        self._calibrate(x_TD)
        plan = self.router(x_TD)
        gates_TE = plan.gates_TE
        self._accumulate_statistics()
        losses = self.router.losses(plan) if self.training else {}
        coefficients = self.router.loss_coefficients
        self.context.start_counts()
        if losses and torch.is_grad_enabled():
            gates_TE = MoEAuxLossAutoScaler.apply(gates_TE, weighted_sum(losses, coefficients) * self._loss_scale)
        if self.training and not self._is_recomputation():
            self._pass_statistics = record(plan, losses, self.router)
        return gates_TE, plan.routing_map_TE

    def _accumulate_statistics(self) -> None:
        """Adds the statistics of the latest forward pass, whose counts have been all-reduced by now."""
        if self._pass_statistics is not None:
            self.router.wait_for_counts()
            vector = self._pass_statistics.vector()
            self._pass_statistics = None
            self._statistics = vector if self._statistics is None else self._statistics + vector

    @torch.no_grad()
    def _calibrate(self, x_TD: Tensor) -> None:
        """Sets the thresholds from the scores of the first training pass, if so configured."""
        if self._needs_calibration and self.training and self.router.is_calibrated is not None:
            with self.context.override(calibrating=True):
                self.router(x_TD)
        self._needs_calibration = self._needs_calibration and not self.training

    def _is_recomputation(self) -> bool:
        """True if activation recomputation repeats an earlier pass, one that ran without gradients."""
        if not torch.is_grad_enabled():
            self._expected_recomputations += 1
            return False
        repeats = self._expected_recomputations > 0
        self._expected_recomputations -= int(repeats)
        return repeats

    def take_figures(self) -> dict[str, float]:
        """Experts per token, load and losses since the last call, over all ranks, by metric name.

        Collective over the ranks that share the layer's tokens. Empty if no training pass ran.
        """
        self._accumulate_statistics()
        if self._statistics is None:
            return {}
        vector = self._statistics
        self._statistics = None
        if self.context.groups.tokens is not None:
            dist.all_reduce(vector, group=self.context.groups.tokens)
        return LayerStatistics(vector.cpu(), self.model, 0).figures(self._expert_parallel)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Weights and state, replicated on all ranks."""
        return {
            f"{prefix}{name}": make_sharded_tensor_for_checkpoint(tensor, f"{prefix}{name}", sharded_offsets)
            for name, tensor in self.state_dict(keep_vars=True).items()
        }


def _model_config(config: TransformerConfig, settings: RouterSpec) -> ModelConfig:
    """The fields of our configuration that a router reads."""
    moe = MoEConfig(experts=config.num_moe_experts)
    size = config.hidden_size
    return ModelConfig(
        layers=1, hidden=size, heads=1, kv_heads=1, init_std=config.init_method_std, moe=moe, router=settings
    )


def with_router(spec: Any, settings: RouterSpec, seed: int = 0) -> Any:
    """Returns a copy of a spec with a dynamic router in its stock MoE layers; unchanged parts are shared.

    Args:
        spec: spec of a layer, of a block (``TransformerBlockSubmodules``) or of a HybridModel's stack.
        settings, seed: see :class:`DynamicRouter`.
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
        raise UserError("with_router: the spec has no MoELayer of Megatron-Core; build it with num_experts")
    return found


def layer_spec(settings: RouterSpec, seed: int = 0) -> ModuleSpec:
    """Megatron's layer spec with a dynamic router in every layer; uses Transformer Engine where it is installed."""
    if HAVE_TE:
        spec = get_gpt_layer_with_transformer_engine_spec(num_experts=1, moe_grouped_gemm=True)
    else:
        spec = get_gpt_layer_local_spec(num_experts=1, normalization="RMSNorm")
    return with_router(spec, settings, seed)


def take_figures(chunks: Sequence[nn.Module]) -> dict[int, dict[str, float]]:
    """By layer index, the result of :meth:`DynamicRouter.take_figures` of each dynamic router on this rank."""
    return {router.layer: router.take_figures() for router in _routers(chunks)}


def _routers(chunks: Sequence[nn.Module]) -> Iterator[DynamicRouter]:
    for chunk in chunks:
        yield from (module for module in chunk.modules() if isinstance(module, DynamicRouter))


# Megatron-LM's --spec takes the name of a spec.
top_p_spec = layer_spec(TopP())
top_any_spec = layer_spec(TopAny(variant="improved"))
