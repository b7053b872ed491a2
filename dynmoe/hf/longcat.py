"""The MoE block of LongCat-Flash (transformers: ``LongcatFlashMoE``) from and to our layer with identity experts.

transformers gives identity experts gate and up projections that nothing reads, saves them, and refuses a checkpoint
without them; published checkpoints may lack them. We write zeros and ignore what we read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from dynmoe.errors import UserError, some
from dynmoe.moe import MoELayer
from dynmoe.routers import IdentityExperts


def longcat_tensors(layer: MoELayer, prefix: str = "model.layers.0.mlp") -> dict[str, Tensor]:
    """The tensors of a block that computes the same as ``layer``, by their names in a checkpoint of transformers.

    Its configuration needs ``n_routed_experts`` (experts of the layer), ``zero_expert_num`` (``num_identity``),
    ``moe_topk`` (``k``) and ``routed_scaling_factor`` (``gate_scale``).

    Raises:
        UserError: the layer has a part that LongCat-Flash does not have.
    """
    spec = _spec(layer)
    width = layer.settings.expert_hidden
    tensors = {name: value.detach() for name, value in _pairs(layer, prefix)}
    unread = torch.zeros_like(layer.experts.w_up_EHD[0, :width])
    for expert in range(layer.num_experts, layer.num_experts + spec.num_identity):
        tensors |= {f"{prefix}.experts.{expert}.{part}_proj.weight": unread.clone() for part in ("gate", "up")}
    return tensors


@torch.no_grad()
def load_longcat(layer: MoELayer, tensors: Mapping[str, Tensor], prefix: str = "model.layers.0.mlp") -> None:
    """Copies a block of a checkpoint into ``layer``, with or without weights of its identity experts.

    Raises:
        UserError: the layer has a part that LongCat-Flash does not have, or tensors are missing or misshapen.
    """
    _spec(layer)
    pairs = list(_pairs(layer, prefix))
    missing = [name for name, _ in pairs if name not in tensors]
    if missing:
        raise UserError(f"missing: {some(missing)}; name the prefix of a LongCat-Flash MoE block")
    for name, own in pairs:
        if tensors[name].shape != own.shape:
            problem = f"has shape {tuple(tensors[name].shape)}, must have {tuple(own.shape)}"
            raise UserError(f"{name}: {problem}; compare the configurations")
    for name, own in pairs:
        own.copy_(tensors[name])


def _spec(layer: MoELayer) -> IdentityExperts:
    """The router of a layer that can be a LongCat-Flash block."""
    spec = layer.router.spec
    if not isinstance(spec, IdentityExperts):
        raise UserError(f"model.router.kind={spec.kind}: LongCat-Flash has none; use identity_experts")
    for name in ("num_zero", "num_constant"):
        if getattr(spec, name):
            raise UserError(
                f"model.router.{name}={getattr(spec, name)}: LongCat-Flash has identity experts only; use 0"
            )
    if spec.n_group > 1:
        raise UserError(f"model.router.n_group={spec.n_group}: LongCat-Flash has no groups; use 1")
    if spec.budgets:
        raise UserError(f"model.router.budgets={spec.budgets}: LongCat-Flash has one budget; use []")
    if layer.shared is not None:
        raise UserError(f"model.moe.shared_hidden={layer.settings.shared_hidden}: LongCat-Flash has none; use 0")
    return spec


def _pairs(layer: MoELayer, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Names in a checkpoint, each with the (part of a) tensor of ours that it corresponds to."""
    yield f"{prefix}.router.classifier.weight", layer.router.get_parameter("weight_ED")
    yield f"{prefix}.router.e_score_correction_bias", layer.router.get_buffer("bias_X")
    width = layer.settings.expert_hidden
    for expert, up_HD, down_DF in zip(
        layer.experts.experts, layer.experts.w_up_EHD, layer.experts.w_down_EDF, strict=True
    ):
        yield f"{prefix}.experts.{expert}.gate_proj.weight", up_HD[:width]
        yield f"{prefix}.experts.{expert}.up_proj.weight", up_HD[width:]
        yield f"{prefix}.experts.{expert}.down_proj.weight", down_DF
