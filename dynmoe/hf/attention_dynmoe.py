"""Attention of an exported model. This file ships with the weights; shape letters as in ``modeling_dynmoe.py``."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dynmoe.hf.configuration_dynmoe import DynMoEConfig
from dynmoe.hf.serving_dynmoe import server_group


def _rotated(x_BHSd: Tensor, cos_BSd: Tensor, sin_BSd: Tensor) -> Tensor:
    first, second = x_BHSd.chunk(2, dim=-1)
    rotated = torch.cat([-second, first], dim=-1)
    return (x_BHSd * cos_BSd.unsqueeze(1) + rotated * sin_BSd.unsqueeze(1)).to(x_BHSd.dtype)


def eager_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float,
    dropout: float = 0.0, **kwargs: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores_BHSP = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores_BHSP = scores_BHSP + attention_mask
    weights_BHSP = scores_BHSP.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights_BHSP @ value).transpose(1, 2), weights_BHSP


class ProjectionNorm(nn.RMSNorm):
    """RMSNorm over all heads. Under vLLM each rank has some of the heads, and the ranks all-reduce their squares."""

    def __init__(self, width: int, eps: float, group: Any) -> None:
        super().__init__(width, eps)
        self.group = group

    def forward(self, x_BSN: Tensor) -> Tensor:
        own = x_BSN.shape[-1]
        whole = self.weight.shape[0]
        if own == whole:
            return super().forward(x_BSN)
        group = self.group
        squares_BS1 = group.all_reduce(x_BSN.float().square().sum(dim=-1, keepdim=True))
        # With more ranks than key heads, each head is replicated on the same number of ranks, so the mean is unchanged.
        scale_BS1 = torch.rsqrt(squares_BS1 / (own * group.world_size) + self.eps)
        first = group.rank_in_group * whole // group.world_size // own * own
        return (x_BSN.float() * scale_BS1 * self.weight[first : first + own].float()).to(x_BSN.dtype)


class DynMoEAttention(nn.Module):
    """Causal grouped-query attention with rotary positions and optionally normalized queries and keys."""

    is_causal = True

    def __init__(self, config: DynMoEConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer
        self.head_dim = width = config.head_dim
        self.scaling = width**-0.5  # vLLM looks for this name
        is_sliding = config.layer_types[layer] == "sliding_attention"
        self.window = {"sliding_window": config.sliding_window} if is_sliding else {}
        heads = config.num_attention_heads
        kv_heads = config.num_key_value_heads
        self.num_key_value_groups = heads // kv_heads  # read by attention implementations
        biased = config.attention_bias is not None
        self.q_proj = nn.Linear(config.hidden_size, heads * width, bias=biased)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads * width, bias=biased)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads * width, bias=biased)
        self.o_proj = nn.Linear(heads * width, config.hidden_size, bias=config.attention_bias == "all")
        if config.qk_norm is not None:
            q_width, k_width = (width, width) if config.qk_norm == "head" else (heads * width, kv_heads * width)
            norm = nn.RMSNorm if config.qk_norm == "head" else partial(ProjectionNorm, group=server_group(config))
            self.q_norm = norm(q_width, config.rms_norm_eps)
            self.k_norm = norm(k_width, config.rms_norm_eps)

    def _heads(self, projected: Tensor, norm: nn.RMSNorm | None = None) -> Tensor:
        """Converts [B, S, H d] to [B, H, S, d] and normalizes it."""
        if norm is not None and self.config.qk_norm == "projection":
            projected = norm(projected)
        heads_BSHd = projected.view(*projected.shape[:2], -1, self.head_dim)
        if norm is not None and self.config.qk_norm == "head":
            heads_BSHd = norm(heads_BSHd)
        return heads_BSHd.transpose(1, 2)

    def forward(
        self, x_BSD: Tensor, angles: tuple[Tensor, Tensor], mask: Any, cache: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        # Written with the same input in one block, so that vLLM can fuse them into one product.
        q = self.q_proj(x_BSD)
        k = self.k_proj(x_BSD)
        v = self.v_proj(x_BSD)
        normed = self.config.qk_norm is not None
        q = _rotated(self._heads(q, self.q_norm if normed else None), *angles)
        k = _rotated(self._heads(k, self.k_norm if normed else None), *angles)
        v = self._heads(v)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        out, weights = attend(self, q, k, v, mask, dropout=0.0, scaling=self.scaling, **self.window, **kwargs)
        return self.o_proj(out.reshape(*x_BSD.shape[:2], -1)), weights
