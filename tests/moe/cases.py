"""What runs on the ranks of a pool for the tests of the MoE layer."""

from __future__ import annotations

from unittest.mock import patch

import torch
import torch.distributed as dist

from dynmoe.config import Config, load_config
from dynmoe.config.model import ModelConfig
from dynmoe.moe import MoEContext, MoEGroups, MoELayer, StepState
from dynmoe.moe.scope import RankScope
from dynmoe.routing.pooled import best_of_batch
from dynmoe.routing.scope import TokenScope

HIDDEN = 16
EXPERTS = 4
ROUTERS = {
    "top_k": ["model.router.kind=top_k", "model.router.k=2"],
    "top_p": ["model.router.kind=top_p", "model.router.p=0.5"],
    "top_any": ["model.router.kind=top_any", "model.router.min_experts=0"],
}
# The others, which the engines' tests try in one layout.
BASELINES = {
    "dtop_p": [
        "model.router.kind=dtop_p", "model.router.p=0.6", "budget.method=pi", "budget.scope=global",
        "budget.experts_per_token=2",
    ],

    "expert_race": ["model.router.kind=expert_race", "budget.experts_per_token=1.5"],
    "expert_threshold": ["model.router.kind=expert_threshold", "model.router.cutoff=0.6", "budget.experts_per_token=2"],
    "identity_experts": ["model.router.kind=identity_experts", "model.router.k=3", "model.router.num_identity=2",
                         "model.router.num_zero=1", "model.router.num_constant=1",
                         "budget.method=loss_free", "budget.experts_per_token=1.5"],
    "null_experts": ["model.router.kind=null_experts", "model.router.k=3", "model.router.num_null=2"],
    "quantile": ["model.router.kind=quantile", "model.router.bins=16", "budget.experts_per_token=2"],
    "quantile running": [
        "model.router.kind=quantile", "model.router.thresholds=running", "model.router.bins=16",
        "budget.experts_per_token=2",
    ],
    "relu": ["model.router.kind=relu", "budget.experts_per_token=2"],
    "resonance": ["model.router.kind=resonance", "model.router.k=3", "budget.experts_per_token=2"],
    "seq_top_k": ["model.router.kind=seq_top_k", "budget.experts_per_token=1.75"],
    "seq_top_k limited": ["model.router.kind=seq_top_k", "model.router.min_experts=0", "model.router.max_experts=2",
                          "model.router.renormalize=true", "budget.experts_per_token=1.5"],
    "sigmoid": ["model.router.kind=sigmoid", "model.router.balance_loss=1e-2"],
    "top_k grouped": ["model.router.kind=top_k", "model.router.k=2", "model.router.score_function=sigmoid",
                      "model.router.renormalize=true", "model.router.gate_scale=2.5", "model.router.n_group=2"],
    "top_p grouped": ["model.router.kind=top_p", "model.router.p=0.6", "model.router.entropy_loss=0",
                      "model.router.gate_scale=2.5", "model.router.n_group=2"],
    "sigmoid grouped": ["model.router.kind=sigmoid", "model.router.min_experts=0", "model.router.n_group=4",
                        "model.router.topk_group=3"],
    "top_p budgets": ["model.router.kind=top_p", "model.router.budgets=[1.5,2,3]", "budget.method=pi",
                      "budget.experts_per_token=2"],
    "top_any improved": ["model.router.kind=top_any", "model.router.variant=improved",
                         "model.router.temperature=learned", "model.router.efficiency_loss=1e-3"],
    "top_any released": ["model.router.kind=top_any", "model.router.variant=released"],
}  # fmt: skip
# These need the attention of their decoder layer, so they are tried in whole decoders only.
ATTENTIVE = {
    "da_moe": ["model.router.kind=da_moe"],
    "da_moe limited": ["model.router.kind=da_moe", "model.router.min_experts=0", "model.router.max_experts=3",
                       "model.router.renormalize=true", "budget.method=pi", "budget.experts_per_token=1.5"],
}  # fmt: skip


# Latent attention; the last field may be left out.
LATENT = [
    "model.kv_heads=2", "model.latent.kv_lora_rank=12", "model.latent.qk_nope_head_dim=6",
    "model.latent.qk_rope_head_dim=4", "model.latent.v_head_dim=8", "model.latent.q_lora_rank=14",
]  # fmt: skip

# LongCat-Flash; model.layers must be even.
LONGCAT = [
    *LATENT, "model.latent.scale_latents=true", "model.latent.norm_eps=1e-6", "model.moe.shortcut=true",
    "model.moe.moe_layer_freq=2", "model.ffn_hidden=64", "model.router.kind=identity_experts", "model.router.k=3",
    "model.router.num_identity=2", "model.router.gate_scale=1.5",
]  # fmt: skip


def tiny_config(*overrides: str) -> Config:
    base = [
        f"model.hidden={HIDDEN}", "model.heads=2", "model.kv_heads=1", "model.layers=2", "model.ffn_hidden=32",
        f"model.moe.experts={EXPERTS}", "model.moe.expert_hidden=24", "model.init_std=0.3",
    ]  # fmt: skip
    return load_config(None, [*base, *overrides])


def tiny_model(*overrides: str) -> ModelConfig:
    return tiny_config(*overrides).model


def no_losses(kind: str) -> list[str]:
    """Fields that switch the auxiliary losses of a router off."""
    names = ("balance", "diversity", "simplicity", "efficiency") if "top_any" in kind else ("balance",)
    names += ("entropy",) if kind in ("top_k", "top_p", "dtop_p", "null_experts") else ()
    if kind in ("relu", "expert_threshold"):
        names = ()
    if kind == "expert_race":
        names = ("similarity",)
    return [f"model.router.{name}_loss=0" for name in names]


def spread_router(layer: MoELayer, seed: int = 0) -> None:
    """Gives the router weights that tell tokens apart, so that K varies."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.router.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.1 if parameter.dim() == 1 else 1.0))


def run_layer(layer: MoELayer, x: torch.Tensor, upstream: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output and every gradient of one pass."""
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(upstream)
    missing = [name for name, parameter in layer.named_parameters() if parameter.grad is None]
    assert not missing, missing
    gradients = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}
    return {"y": y.detach(), "x": x.grad.clone(), **gradients}


def expert_parallel_equals_local(overrides: list[str], tokens_per_rank: list[int], steer_to: int | None) -> dict:
    """One layer spread over all ranks against the same layer held whole, on the tokens of all ranks.

    Returns, by name, the largest difference relative to the largest value. ``steer_to`` sends every token to one
    expert.
    """
    rank = dist.get_rank()
    model = tiny_model(*overrides)
    group = dist.new_group(list(range(dist.get_world_size())))
    step = StepState(recording=True, target_experts=2.0)
    spread = MoELayer(model, 0, 0, MoEContext(MoEGroups(expert=group, tokens=group), step=step))
    whole = MoELayer(model, 0, 0, MoEContext(step=step))
    for layer in (spread, whole):
        spread_router(layer)
        if steer_to is not None:
            with torch.no_grad():
                layer.router.weight_ED.zero_()
                layer.router.weight_ED[steer_to] = 8.0
    generator = torch.Generator().manual_seed(7)
    total = sum(tokens_per_rank)
    x = torch.randn(total, HIDDEN, generator=generator)
    upstream = torch.randn(total, HIDDEN, generator=generator)
    if steer_to is not None:
        x = x.abs() + 0.5
    start = sum(tokens_per_rank[:rank])
    mine = slice(start, start + tokens_per_rank[rank])

    local = run_layer(spread, x[mine], upstream[mine])
    reference = run_layer(whole, x, upstream)
    experts = slice(spread.experts.experts.start, spread.experts.experts.stop)
    reference = {
        name: value[mine] if name in ("y", "x") else value[experts] if name.startswith("experts.") else value
        for name, value in reference.items()
    }
    for name, value in local.items():
        if name not in ("y", "x") and not name.startswith("experts."):
            dist.all_reduce(value)  # replicated weights: each rank has its tokens' share
    return {
        name: ((local[name] - expected).abs().max() / expected.abs().max().clamp(min=1e-6)).item()
        if expected.numel() else 0.0
        for name, expected in reference.items()
    }  # fmt: skip


def bytes_on_the_wire(overrides: list[str], tokens: int) -> tuple[int, int]:
    """What one pass over a layer with shared expert sent from this rank, and what could not be saved of it.

    That is four rows (tokens and outputs, and their gradients) for each token and other rank that has an expert of it;
    and for each route there 8 bytes, and 4 for the gate's gradient; and two counts for each other rank.
    """
    group = dist.new_group(list(range(dist.get_world_size())))
    layer = MoELayer(tiny_model(*overrides, "model.moe.shared_hidden=8"), 0, 0, MoEContext(MoEGroups(expert=group)))
    spread_router(layer)
    x = torch.randn(tokens, HIDDEN, requires_grad=True)
    layer(x).sum().backward()
    with torch.no_grad():
        layer.eval()(x)  # does not count
        away_TRL = layer.router(x).routing_map_TE.view(tokens, dist.get_world_size(), -1).clone()
    away_TRL[:, dist.get_rank()] = False
    rows = int(away_TRL.any(dim=2).sum())
    routes = int(away_TRL.sum())
    came = torch.tensor([rows, routes])
    # Outputs and gradients of what came from elsewhere leave this rank too.
    dist.all_reduce(came)
    others = came - torch.tensor([rows, routes])
    minimum = (2 * rows + 2 * int(others[0])) * HIDDEN * 4 + routes * 8 + int(others[1]) * 4 + 16
    return layer.drain().sent_bytes, minimum


def ranks_reached(overrides: list[str], tokens: int) -> tuple[list[int], list[int]]:
    """Of tokens of this rank: to how many ranks each is sent, and how many experts it has."""
    group = dist.new_group(list(range(dist.get_world_size())))
    layer = MoELayer(tiny_model(*overrides), 0, 0, MoEContext(MoEGroups(expert=group)))
    spread_router(layer)
    x = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(dist.get_rank()))
    plan = layer.router(x)
    dispatched = layer.dispatcher.dispatch(x, plan)
    layer.dispatcher.receive(dispatched)
    sent_T = dispatched.senders.token_N.bincount(minlength=tokens)
    assert sum(dispatched.exchange.send) == int(sent_T.sum())
    return sent_T.tolist(), plan.experts_per_token_T.tolist()


def race_over_ranks(tokens_per_rank: list[int]) -> tuple[list, list, list[int]]:
    """What this rank selects, what one rank would for its tokens, and the elements of each all-reduce."""
    rank = dist.get_rank()
    values = torch.rand(sum(tokens_per_rank), EXPERTS, generator=torch.Generator().manual_seed(3))
    start = sum(tokens_per_rank[:rank])
    mine = slice(start, start + tokens_per_rank[rank])
    scope = RankScope(1, MoEGroups(tokens=dist.new_group(list(range(dist.get_world_size())))))
    with patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduced:
        found = best_of_batch(values[mine], 1.5, scope)
    elements = [call.args[0].numel() for call in reduced.call_args_list]
    return found.tolist(), best_of_batch(values, 1.5, TokenScope())[mine].tolist(), elements
