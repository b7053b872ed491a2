"""Checks Megatron's configuration for a dynamic router in Megatron's own MoE layer."""

from __future__ import annotations

import functools
import logging
from typing import NoReturn

import torch.distributed as dist
from megatron.core.transformer.transformer_config import TransformerConfig

from dynmoe.engines.megatron import versions
from dynmoe.errors import UserError
from dynmoe.routers import RouterSpec

_LOG = logging.getLogger(__name__)
# Fields of TransformerConfig that assume moe_router_topk, or that only the stock router obeys, each with its allowed
# value, the reason and the fix. Not every version of Megatron-Core has all of them.
_FIXED_K = {
    "moe_permute_fusion": (False, "its buffers have moe_router_topk rows per token; set it to False"),
    "moe_expert_capacity_factor": (None, "it assumes moe_router_topk routes per token; remove it"),
    "moe_pad_expert_input_to_capacity": (False, "it assumes moe_router_topk routes per token; set it to False"),
    "moe_router_padding_for_quantization": (False, "only the stock router pads its map; set it to False"),
}
_STOCK_ROUTER = {
    "moe_aux_loss_coeff": (0.0, "it divides by moe_router_topk; use balance_loss of the router"),
    "moe_z_loss_coeff": (None, "it belongs to the stock router; use z_loss of the router"),
    "moe_router_enable_expert_bias": (False, "it belongs to the stock router; set it to False"),
    "moe_router_force_load_balancing": (False, "it belongs to the stock router; set it to False"),
    "moe_router_force_biased": (None, "it belongs to the stock router; remove it"),
    "moe_router_fusion": (False, "it belongs to the stock router; set it to False"),
    "moe_router_group_topk": (None, "it belongs to the stock router; remove it"),
    "moe_router_num_groups": (None, "it belongs to the stock router; remove it"),
    "moe_router_topk_scaling_factor": (None, "it belongs to the stock router; remove it"),
    "moe_router_score_function": ("softmax", "it belongs to the stock router; choose another router"),
    "moe_router_pre_softmax": (False, "it belongs to the stock router; set it to False"),
    "moe_enable_routing_replay": (False, "it replays moe_router_topk experts per token; set it to False"),
    "moe_input_jitter_eps": (None, "it belongs to the stock router; remove it"),
    "calculate_per_token_loss": (False, "it would change the scale of auxiliary losses; set it to False"),
}
# Balancing methods without a loss, which moe_aux_loss_coeff therefore does not show.
_STOCK_BALANCING = {"sinkhorn", "quantile_balancing"}
# Modules that a CUDA graph can capture: those whose number of rows does not vary.
_CAPTURABLE = {"attn", "mlp", "mamba"}


def check_config(config: TransformerConfig, settings: RouterSpec) -> None:
    """Refuses options that assume a fixed number of experts per token, or would be silently ignored.

    Raises:
        UserError: names the field, its value and the fix.
    """
    for field, (allowed, fix) in {**_FIXED_K, **_STOCK_ROUTER}.items():
        if getattr(config, field, allowed) != allowed:
            _refuse(config, field, fix)
    balance = config.moe_router_load_balancing_type
    if _STOCK_BALANCING.intersection([balance] if isinstance(balance, str) else balance):
        _refuse(config, "moe_router_load_balancing_type", "it belongs to the stock router; set it to 'none'")
    if config.moe_token_dispatcher_type == "flex" and config.moe_flex_dispatcher_backend != "hybridep":
        fix = "it sends each token to its top moe_router_topk experts; use 'hybridep', or dispatcher 'alltoall'"
        _refuse(config, "moe_flex_dispatcher_backend", fix)
    if config.transformer_impl == "inference_optimized":
        _refuse(config, "transformer_impl", "it computes moe_router_topk experts per token; use another implementation")
    if config.cuda_graph_impl != "none" and not versions.captured_modules(config) <= _CAPTURABLE:
        fix = "a graph has a fixed number of rows and counts no tokens; set it to 'none' or capture attention only"
        _refuse(config, "cuda_graph_impl", fix)
    experts_are_replicated = config.expert_tensor_parallel_size == config.expert_model_parallel_size == 1
    if config.tensor_model_parallel_size > 1 and experts_are_replicated:
        problem = "Megatron's MoE layer does not sum gradients of replicated experts over tensor-parallel ranks"
        raise UserError(
            f"expert_tensor_parallel_size=1: {problem}; raise it, or set expert_model_parallel_size above 1"
        )
    _check_router(settings)


def _check_router(settings: RouterSpec) -> None:
    """Refuses routers that need more than Megatron's layer and loop give them."""
    if settings.HAS_OWN_RULE:
        problem = "updates its state between steps, which a stock training loop does not do"
        raise UserError(f"kind={settings.kind!r}: {problem}; use engine=megatron")
    if settings.budgets:
        problem = "are drawn between steps, which a stock training loop does not do"
        raise UserError(f"budgets={settings.budgets}: {problem}; use engine=megatron, or []")
    if settings.NEEDS_ATTENTION:
        problem = "needs the attention of its layer, which Megatron's layer does not pass on"
        raise UserError(f"kind={settings.kind!r}: {problem}; use engine=megatron")
    if settings.ADDS_OUTPUT:
        problem = "computes part of the output itself, which Megatron's layer does not add"
        raise UserError(f"kind={settings.kind!r}: {problem}; use engine=megatron")
    if settings.selects_among == "sequence":
        problem = "selects within sequences, which the stock layer mixes"
        raise UserError(f"kind={settings.kind!r}: {problem}; use engine=megatron")
    if settings.balance_scope == "sequence":
        raise UserError(
            "balance_scope='sequence': the stock layer mixes sequences; use global_batch (the tokens of "
            "all ranks in one forward pass) or micro_batch"
        )


def _refuse(config: TransformerConfig, field: str, fix: str) -> NoReturn:
    raise UserError(f"{field}={getattr(config, field)!r}: incompatible with a dynamic router: {fix}")


def warn_of_dropped_rows(config: TransformerConfig) -> None:
    """Warns once about a fixed number of rows per rank (``moe_expert_rank_capacity_factor``, from 0.18 on)."""
    factor = getattr(config, "moe_expert_rank_capacity_factor", None)
    if factor is not None and dist.get_rank() == 0:
        _warn_once(
            f"moe_expert_rank_capacity_factor={factor}: a rank takes {factor} x {config.moe_router_topk} "
            "(moe_router_topk) rows per token and drops the rest, unless Megatron's PagedStashRunner repeats the step "
            "without a limit; set moe_router_topk to the mean number of experts per token that you aim at"
        )


@functools.cache
def _warn_once(line: str) -> None:
    _LOG.warning(line)
