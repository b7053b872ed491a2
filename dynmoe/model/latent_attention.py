"""Multi-head latent attention: the keys and values of all heads are computed from one latent.

Shape suffixes besides those of ``dynmoe.model.attention``: a query and key, d, have a part n that is not rotated and a
part r that is. c is the width of the latent, and e = c + r that of what is cached.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynmoe.config import ModelConfig
from dynmoe.model.attention import BaseAttention
from dynmoe.model.cache import LayerCache
from dynmoe.model.documents import CausalMask, Documents
from dynmoe.model.rotary import rotate
from dynmoe.moe.experts import down_std
from dynmoe.moe.initialization import named_normal


class LatentNorm(nn.RMSNorm):
    """RMSNorm of a latent.

    With ``scale_latents`` times the root of D over the latent's width. What is computed from the latent then initially
    has the variance that it would have if it were computed from x (LongCat-Flash, arXiv 2509.01322).
    """

    def __init__(self, model: ModelConfig, width: int) -> None:
        super().__init__(width, model.latent_norm_eps)
        self.factor = math.sqrt(model.hidden / width) if model.latent.scale_latents else 1.0

    def forward(self, x: Tensor) -> Tensor:
        normed = super().forward(x)
        return normed if self.factor == 1 else normed * self.factor


class LatentAttention(BaseAttention):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    Only part of each query and key is rotated, and that part of the key is the same for all heads. The cache holds the
    latent and that part of the key, instead of the keys and values of all heads.

    Rows of the weights: of ``w_q`` or ``w_q_up``, for each head its n and r; of ``w_kv_down``, c and r; of ``w_kv_up``,
    for each head its key (n) and value. Rows i and i + r / 2 are rotated together; in DeepSeek's files, neighbours are.

    Args:
        model, layer, recompute: see :class:`BaseAttention`.
        seed: seed of the initial weights.
    """

    def __init__(self, model: ModelConfig, layer: int, seed: int, recompute: bool = False) -> None:
        super().__init__(model, layer, recompute)
        latent = model.latent
        assert latent.kv_lora_rank is not None
        self.rank = latent.kv_lora_rank
        self.plain = latent.qk_nope_head_dim
        self.rotated = latent.qk_rope_head_dim
        self.value = latent.v_head_dim
        # YaRN's factor of queries and keys, on queries alone.
        self.scale = model.rope_scaling.query_key_scale**2

        def weight(name: str, rows: int, columns: int, std: float = model.init_std) -> nn.Parameter:
            return nn.Parameter(named_normal((rows, columns), std, seed, f"layers.{layer}.attention.{name}"))

        self.q_norm: LatentNorm | None = None
        queries = self.heads * model.width_of_head
        if latent.q_lora_rank is None:
            self.w_q = weight("w_q", queries, model.hidden)
        else:
            self.w_q_down = weight("w_q_down", latent.q_lora_rank, model.hidden)
            self.q_norm = LatentNorm(model, latent.q_lora_rank)
            self.w_q_up = weight("w_q_up", queries, latent.q_lora_rank)
        self.w_kv_down = weight("w_kv_down", self.rank + self.rotated, model.hidden)
        self.kv_norm = LatentNorm(model, self.rank)
        self.w_kv_up = weight("w_kv_up", self.heads * (self.plain + self.value), self.rank)
        self.w_out = weight("w_out", model.hidden, self.heads * self.value, down_std(model))

    def forward(
        self, x_BSD: Tensor, cos_Sr: Tensor, sin_Sr: Tensor, cache: LayerCache | None = None,
        documents: Documents | None = None,
    ) -> Tensor:  # fmt: skip
        """Attention output, [B, S, D]; see :meth:`Attention.forward` for the arguments."""
        q_BHSn, q_BHSr = self._queries(x_BSD).split([self.plain, self.rotated], dim=-1)
        q_BHSr = rotate(q_BHSr, cos_Sr, sin_Sr)
        latent_B1Sc, k_B1Sr = F.linear(x_BSD, self.w_kv_down).unsqueeze(1).split([self.rank, self.rotated], dim=-1)
        cached_B1Pe = torch.cat([self.kv_norm(latent_B1Sc), rotate(k_B1Sr, cos_Sr, sin_Sr)], dim=-1)
        if cache is not None:
            (cached_B1Pe,) = cache.extend(cached_B1Pe)
        attention = self._absorbed if cache is not None and x_BSD.shape[1] == 1 else self._expanded
        out_BHSv = attention(q_BHSn, q_BHSr, cached_B1Pe, self.mask(cache, documents))
        return F.linear(out_BHSv.transpose(1, 2).flatten(2), self.w_out)

    def _queries(self, x_BSD: Tensor) -> Tensor:
        if self.q_norm is None:
            q_BSd = F.linear(x_BSD, self.w_q)
        else:
            q_BSd = F.linear(self.q_norm(F.linear(x_BSD, self.w_q_down)), self.w_q_up)
        q_BHSd = q_BSd.unflatten(2, (self.heads, -1)).transpose(1, 2)
        return q_BHSd if self.scale == 1 else q_BHSd * self.scale

    def _expanded(
        self, q_BHSn: Tensor, q_BHSr: Tensor, cached_B1Pe: Tensor, mask: Tensor | CausalMask | None
    ) -> Tensor:
        """Attention with the keys and values of all heads, [B, H, S, v] (sections 2.1.2 and 2.1.3)."""
        latent_B1Pc, k_B1Pr = cached_B1Pe.split([self.rank, self.rotated], dim=-1)
        kv_BHP = F.linear(latent_B1Pc.squeeze(1), self.w_kv_up).unflatten(2, (self.heads, -1)).transpose(1, 2)
        k_BHPn, v_BHPv = kv_BHP.split([self.plain, self.value], dim=-1)
        q_BHSd = torch.cat([q_BHSn, q_BHSr], dim=-1)
        k_BHPd = torch.cat([k_BHPn, k_B1Pr.expand(-1, self.heads, -1, -1)], dim=-1)
        return self.attend(q_BHSd, k_BHPd, v_BHPv, mask)

    def _absorbed(
        self, q_BHSn: Tensor, q_BHSr: Tensor, cached_B1Pe: Tensor, mask: Tensor | CausalMask | None
    ) -> Tensor:
        """The same with the latent as the key and value of all heads: the queries take the keys' projection over.

        It reads e numbers of each earlier position, and is faster for few queries (arXiv 2405.04434, section 2.1.2).
        """
        w_Hnc, w_Hvc = self.w_kv_up.unflatten(0, (self.heads, -1)).split([self.plain, self.value], dim=1)
        q_BHSe = torch.cat([q_BHSn @ w_Hnc, q_BHSr], dim=-1)
        # SDPA divides by the root of e instead of d.
        q_BHSe = q_BHSe * math.sqrt((self.rank + self.rotated) / (self.plain + self.rotated))
        out_BHSc = self.attend(q_BHSe, cached_B1Pe, cached_B1Pe, mask)[..., : self.rank]
        return out_BHSc @ w_Hvc.transpose(1, 2)
