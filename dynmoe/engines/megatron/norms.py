"""Norms of a Megatron model that need neither Apex nor Transformer Engine."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """RMSNorm that supports sequence parallelism: the weight only needs a flag. Megatron's wrapper refuses it."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class ProjectionNorm(MegatronModule):
    """RMSNorm over all heads of the queries or keys; each tensor-parallel rank holds some of the heads."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, *, heads: int) -> None:
        super().__init__(config)
        self._width = heads * hidden_size
        self._eps = eps
        self.weight = nn.Parameter(torch.ones(self._width // config.tensor_model_parallel_size))

    def forward(self, x_SBHd: Tensor) -> Tensor:
        squares_SB1 = x_SBHd.float().square().sum(dim=(2, 3)).unsqueeze(-1)
        # Every rank uses the sum over all ranks, so the gradients are summed over ranks too.
        region = tensor_parallel.reduce_from_tensor_model_parallel_region(squares_SB1)
        mean_SB1 = tensor_parallel.copy_to_tensor_model_parallel_region(region) / self._width
        normal = x_SBHd.float().flatten(2) * torch.rsqrt(mean_SB1 + self._eps)
        return (normal * self.weight.float()).to(x_SBHd.dtype).view_as(x_SBHd)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, ShardedTensor]:
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0}, sharded_offsets)
