"""What of Megatron's settings goes with a dynamic router in its own MoE layer."""

from __future__ import annotations

import functools
import logging
from typing import NoReturn

import torch.distributed as dist
from megatron.core.transformer.transformer_config import TransformerConfig

from dynmoe.config.routing import KINDS, RouterConfig
from dynmoe.engines.megatron import versions
from dynmoe.errors import UserError

_LOG = logging.getLogger(__name__)
# Fields of TransformerConfig that count moe_router_topk, or that the stock router alone obeys: value that is sound,
# and what to do. Each version of Megatron-Core has some of them.
_FIXED_K = {
    "moe_permute_fusion": (False, "its buffers have moe_router_topk rows for each token; set it to False"),
    "moe_expert_capacity_factor": (None, "it counts moe_router_topk routes for each token; remove it"),
    "moe_pad_expert_input_to_capacity": (False, "it counts moe_router_topk routes for each token; set it to False"),
    "moe_router_padding_for_quantization": (False, "the stock router pads its map itself; set it to False"),
}
_STOCK_ROUTER = {
    "moe_aux_loss_coeff": (0.0, "it divides by moe_router_topk; use RouterConfig.balance_loss"),
    "moe_z_loss_coeff": (None, "it belongs to the stock router; use RouterConfig.z_loss"),
    "moe_router_enable_expert_bias": (False, "it belongs to the stock router; set it to False"),
    "moe_router_force_load_balancing": (False, "it belongs to the stock router; set it to False"),
    "moe_router_force_biased": (None, "it belongs to the stock router; remove it"),
    "moe_router_fusion": (False, "it belongs to the stock router; set it to False"),
    "moe_router_group_topk": (None, "it belongs to the stock router; remove it"),
    "moe_router_num_groups": (None, "it belongs to the stock router; remove it"),
    "moe_router_topk_scaling_factor": (None, "it belongs to the stock router; remove it"),
    "moe_router_score_function": ("softmax", "it belongs to the stock router; use RouterConfig.kind"),
    "moe_router_pre_softmax": (False, "it belongs to the stock router; set it to False"),
    "moe_enable_routing_replay": (False, "it replays moe_router_topk experts of each token; set it to False"),
    "moe_input_jitter_eps": (None, "it belongs to the stock router; remove it"),
    "calculate_per_token_loss": (False, "auxiliary losses would lose their scale; set it to False"),
}
# Ways of balancing that are not losses, and so say nothing in moe_aux_loss_coeff.
_OWN_BALANCE = {"sinkhorn", "quantile_balancing"}
# Parts of a model that a graph of kernels can hold; a varying number of rows it cannot.
_CAPTURED = {"attn", "mlp", "mamba"}


def check_config(config: TransformerConfig, settings: RouterConfig) -> None:
    """Refuses what assumes a fixed number of experts per token, or would be ignored in silence.

    Raises:
        UserError: naming the field, its value and the cure.
    """
    for field, (sound, cure) in {**_FIXED_K, **_STOCK_ROUTER}.items():
        if getattr(config, field, sound) != sound:
            _refuse(config, field, cure)
    balance = config.moe_router_load_balancing_type
    if _OWN_BALANCE.intersection([balance] if isinstance(balance, str) else balance):
        _refuse(config, "moe_router_load_balancing_type", "it belongs to the stock router; set it to 'none'")
    if config.moe_token_dispatcher_type == "flex" and config.moe_flex_dispatcher_backend != "hybridep":
        cure = "it sends the moe_router_topk likeliest experts of each token; use 'hybridep', or dispatcher 'alltoall'"
        _refuse(config, "moe_flex_dispatcher_backend", cure)
    if config.transformer_impl == "inference_optimized":
        _refuse(config, "transformer_impl", "it computes moe_router_topk experts of each token; use another")
    if config.cuda_graph_impl != "none" and not versions.captured(config) <= _CAPTURED:
        cure = "a graph holds one number of rows, and counts nothing; set it to 'none' or capture attention alone"
        _refuse(config, "cuda_graph_impl", cure)
    if (
        config.tensor_model_parallel_size > 1
        and config.expert_tensor_parallel_size == 1
        and (config.expert_model_parallel_size == 1)
    ):
        problem = "Megatron's own layer does not add up the gradients of whole experts over tensor-parallel ranks"
        raise UserError(f"expert_tensor_parallel_size=1: {problem} without expert parallelism; set one of them")
    if settings.kind not in KINDS or KINDS[settings.kind].own_rule:
        problem = "moves its state between steps by a rule that a stock training loop does not run"
        raise UserError(f"RouterConfig.kind={settings.kind!r}: {problem}; use engine=megatron")
    if settings.balance_scope == "sequence":
        raise UserError(
            "RouterConfig.balance_scope='sequence': the stock layer mixes sequences; use global_batch (the tokens of "
            "all ranks in one pass) or micro_batch"
        )


def _refuse(config: TransformerConfig, field: str, cure: str) -> NoReturn:
    raise UserError(f"{field}={getattr(config, field)!r}: does not go with a dynamic router: {cure}")


def say_what_is_dropped(config: TransformerConfig) -> None:
    """Warns, once, of a budget of rows (``moe_expert_rank_capacity_factor``, from 0.18 on)."""
    factor = getattr(config, "moe_expert_rank_capacity_factor", None)
    if factor is not None and dist.get_rank() == 0:
        _warn(
            f"moe_expert_rank_capacity_factor={factor}: a rank takes {factor} x {config.moe_router_topk} "
            "(moe_router_topk) rows for each token and drops the rest, unless Megatron's PagedStashRunner repeats the "
            "step without a budget; set moe_router_topk to the mean number of experts that is aimed at"
        )


@functools.cache
def _warn(line: str) -> None:
    _LOG.warning(line)
