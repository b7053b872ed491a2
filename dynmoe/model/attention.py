"""Causal self-attention with rotary position embedding and grouped queries."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint

from dynmoe.config import ModelConfig
from dynmoe.model.cache import LayerCache
from dynmoe.model.documents import CausalMask, Documents
from dynmoe.model.importance import importance, own_weights
from dynmoe.model.rotary import rotate
from dynmoe.moe.experts import down_std
from dynmoe.moe.initialization import named_normal

_FLEX_WIDTH = 16  # FlexAttention has no kernel for narrower heads


def causal_attention(q_BHSd: Tensor, k_BKPd: Tensor, v_BKPv: Tensor, mask: Tensor | CausalMask | None = None) -> Tensor:
    """Softmax attention in which consecutive groups of the H query heads share one of K key-value heads; [B, H, S, v].

    Each position attends to itself and earlier positions, or to those of a mask, which may be a tensor [B, 1, S, P].
    Without a mask, the queries are all positions, or the last one. Values may be narrower than keys.
    """
    grouped = q_BHSd.shape[1] != k_BKPd.shape[1]
    surplus = q_BHSd.shape[3] - v_BKPv.shape[3]
    if isinstance(mask, CausalMask):
        if q_BHSd.is_cuda and v_BKPv.shape[3] >= _FLEX_WIDTH:
            return _flex_attention()(q_BHSd, k_BKPd, v_BKPv, block_mask=mask.blocks, enable_gqa=grouped)
        mask = mask.mask_B1QP
    causal = mask is None and q_BHSd.shape[2] > 1
    if surplus:  # for values of another width, SDPA on a CPU holds the weights of all pairs
        v_BKPv = F.pad(v_BKPv, (0, surplus))
    out_BHSd = F.scaled_dot_product_attention(q_BHSd, k_BKPd, v_BKPv, mask, is_causal=causal, enable_gqa=grouped)
    return out_BHSd[..., :-surplus] if surplus else out_BHSd


def attend(q_BHSd: Tensor, k_BKPd: Tensor, v_BKPv: Tensor, mask: Tensor | CausalMask | None, recompute: bool) -> Tensor:
    """:func:`causal_attention`, if wanted with its activations recomputed in the backward pass."""
    if recompute and torch.is_grad_enabled():
        inputs = (q_BHSd, k_BKPd, v_BKPv, mask)
        return checkpoint(causal_attention, *inputs, use_reentrant=False, preserve_rng_state=False)
    return causal_attention(q_BHSd, k_BKPd, v_BKPv, mask)


@cache
def _flex_attention() -> Callable[..., Tensor]:
    """FlexAttention (arXiv 2412.05496) as a kernel that skips what a mask hides; without a compiler it would not."""
    return torch.compile(flex_attention, dynamic=False)


class HeadNorm(nn.RMSNorm):
    """RMSNorm of each head separately, with a weight shared by all heads."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__(model.width_of_head, model.norm_eps)


class ProjectionNorm(nn.RMSNorm):
    """RMSNorm over all ``heads`` heads together."""

    def __init__(self, model: ModelConfig, heads: int) -> None:
        super().__init__(heads * model.width_of_head, model.norm_eps)

    def forward(self, x_BHSd: Tensor) -> Tensor:
        x_BSHd = x_BHSd.transpose(1, 2)
        return super().forward(x_BSHd.flatten(2)).view_as(x_BSHd).transpose(1, 2)


class BaseAttention(nn.Module):
    """The part of attention between its projections.

    Args:
        model: configuration of the model.
        layer: index in the decoder.
        recompute: recompute the activations between the projections in the backward pass (selective activation
            recomputation, arXiv 2205.05198).

    Attributes:
        importance_BS: importance of the latest positions, if the router needs it; else None.
    """

    importance_BS: Tensor | None

    def __init__(self, model: ModelConfig, layer: int, recompute: bool) -> None:
        super().__init__()
        self.window = model.window_of(layer)
        self.recompute = recompute
        self.importance_BS = None
        self.measures_importance = model.router.NEEDS_ATTENTION
        self.heads = model.heads

    def mask(self, cache: LayerCache | None, documents: Documents | None) -> Tensor | CausalMask | None:
        """What the latest positions attend to; ``cache`` already has them."""
        if cache is not None:
            return cache.mask_B1SP(self.window)
        return None if documents is None else documents.mask(self.window)

    def attend(self, q_BHSd: Tensor, k_BKPd: Tensor, v_BKPv: Tensor, mask: Tensor | CausalMask | None) -> Tensor:
        """Attention of the latest positions, [B, H, S, v]."""
        if self.measures_importance:
            self.importance_BS = importance(own_weights(q_BHSd, k_BKPd, mask), self.heads)
        return attend(q_BHSd, k_BKPd, v_BKPv, mask, self.recompute)


class Attention(BaseAttention):
    """Attention with one projection for query, key and value (rows in this order), using PyTorch's SDPA.

    Queries and keys may be normalized before rotation (``model.qk_norm``; arXiv 2010.04245).

    Args:
        model, layer, recompute: see :class:`BaseAttention`.
        seed: seed of the initial weights.
    """

    def __init__(self, model: ModelConfig, layer: int, seed: int, recompute: bool = False) -> None:
        super().__init__(model, layer, recompute)
        name = f"layers.{layer}.attention"
        self.kv_heads = model.kv_heads
        self.head_dim = model.width_of_head
        rows = (model.heads + 2 * model.kv_heads) * self.head_dim
        width = model.heads * self.head_dim
        self.w_qkv = nn.Parameter(named_normal((rows, model.hidden), model.init_std, seed, f"{name}.w_qkv"))
        self.w_out = nn.Parameter(named_normal((model.hidden, width), down_std(model), seed, f"{name}.w_out"))
        self.b_qkv = None if model.attention_bias is None else nn.Parameter(torch.zeros(rows))
        self.b_out = nn.Parameter(torch.zeros(model.hidden)) if model.attention_bias == "all" else None
        self.q_norm, self.k_norm = (
            {None: None, "head": HeadNorm(model), "projection": ProjectionNorm(model, heads)}[model.qk_norm]
            for heads in (model.heads, model.kv_heads)
        )

    def forward(
        self, x_BSD: Tensor, cos_Sd: Tensor, sin_Sd: Tensor, cache: LayerCache | None = None,
        documents: Documents | None = None,
    ) -> Tensor:  # fmt: skip
        """Attention output, [B, S, D].

        Args:
            x_BSD: input of the latest positions.
            cos_Sd, sin_Sd: rotary tables of these positions, for all sequences or [B, 1, S, d].
            cache: cache of earlier positions; None if there are none.
            documents: what the positions attend to, unless there is a cache.
        """
        batch, positions, _ = x_BSD.shape
        qkv = F.linear(x_BSD, self.w_qkv, self.b_qkv).view(batch, positions, -1, self.head_dim).transpose(1, 2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
            q = rotate(self.q_norm(q), cos_Sd, sin_Sd)
            k = rotate(self.k_norm(k), cos_Sd, sin_Sd)
        else:
            qk, v = qkv.split([self.heads + self.kv_heads, self.kv_heads], dim=1)
            q, k = rotate(qk, cos_Sd, sin_Sd).split([self.heads, self.kv_heads], dim=1)
        if cache is not None:
            k, v = cache.extend(k, v)
        out_BHSd = self.attend(q, k, v, self.mask(cache, documents))
        return F.linear(out_BHSd.transpose(1, 2).reshape(batch, positions, -1), self.w_out, self.b_out)
