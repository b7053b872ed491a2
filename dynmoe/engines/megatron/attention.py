"""Our parts of Megatron's attention: norms of heads, positions, attention itself, a bias of the output."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from dynmoe.config import ModelConfig
from dynmoe.engines.megatron.norms import ProjectionNorm, RMSNorm
from dynmoe.model.attention import attend
from dynmoe.model.documents import Documents
from dynmoe.model.importance import importance, own_weights
from dynmoe.ops.sequence_exchange import heads_to_positions, positions_to_heads


class QKNormAttention(SelfAttention):
    """Self-attention with norms of queries and keys.

    Megatron's own option selects these norms by name and all-reduces their gradients over tensor-parallel ranks, even
    where the weight is sharded.
    """

    def __init__(self, config: TransformerConfig, *args: Any, model: ModelConfig, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        size = model.width_of_head
        eps = model.norm_eps
        if model.qk_norm == "head":
            self.q_layernorm, self.k_layernorm = (RMSNorm(config, size, eps) for _ in range(2))
        else:
            self.q_layernorm = ProjectionNorm(config, size, eps, heads=model.heads)
            self.k_layernorm = ProjectionNorm(config, size, eps, heads=model.kv_heads)


class DocumentRotaryEmbedding(RotaryEmbedding):
    """Rotary embedding of the positions of a context-parallel rank, which begin at 0 in each document.

    Attributes:
        documents: those of the next forward pass.
    """

    documents: Documents | None = None

    def forward(self, max_seq_len: int, *args: Any, **kwargs: Any) -> Tensor:
        """Angles of the P positions of this rank, [P, 1, 1, d], or with documents [P, B, 1, d]."""
        angles_S11d = super().forward(max_seq_len, packed_seq=True)  # else Megatron would choose the positions
        ranks = parallel_state.get_context_parallel_world_size()
        rank = parallel_state.get_context_parallel_rank()
        place_BS = None if self.documents is None else self.documents.place_BS
        if place_BS is None:
            return angles_S11d.chunk(ranks)[rank]
        return angles_S11d[place_BS.chunk(ranks, dim=1)[rank].t(), 0]


class BiasedOutput(tensor_parallel.RowParallelLinear):
    """The output projection of attention with a bias; Megatron's configuration has one switch for all projections."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs | {"bias": True})


class CoreAttention(MegatronModule):
    """The attention of the plain model between Megatron's projections; never keeps an [S, S] tensor.

    Under context parallelism each rank computes all positions of its share of the heads.

    Attributes:
        importance_BS: importance of the positions of the latest forward pass, over the heads of all ranks; None if the
            router does not need it.
    """

    def __init__(
        self, config: TransformerConfig, *, window: int | None, measures_importance: bool, recompute: bool,
        query_key_scale: float, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(config)
        self.importance_BS: Tensor | None = None
        self._measures_importance = measures_importance
        self._window = window
        self._recompute = recompute
        self._scale = query_key_scale**2  # of queries and of keys, which Megatron has rotated without it
        self._heads = config.num_attention_heads

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Documents, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Maps query [P, B, H, d], key [P, B, K, d] and value [P, B, K, v] to [P, B, H v].

        Megatron passes documents as the mask.
        """
        mask = attention_mask.mask(self._window)
        group = parallel_state.get_context_parallel_group()
        is_split = dist.get_world_size(group) > 1
        query = query if self._scale == 1 else query * self._scale
        heads = [positions_to_heads(x, group) if is_split else x for x in (query, key, value)]
        q_BHSd, k_BKSd, v_BKSv = (x_SBHd.permute(1, 2, 0, 3) for x_SBHd in heads)
        if self._measures_importance:
            weights_BS = own_weights(q_BHSd, k_BKSd, mask)  # of this rank's heads
            dist.all_reduce(weights_BS, group=parallel_state.get_tensor_and_context_parallel_group())
            self.importance_BS = importance(weights_BS, self._heads)
        out_SBHv = attend(q_BHSd, k_BKSd, v_BKSv, mask, self._recompute).permute(2, 0, 1, 3)
        return (heads_to_positions(out_SBHv, group) if is_split else out_SBHv).flatten(2)
