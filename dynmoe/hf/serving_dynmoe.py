"""Experts cut over the ranks of vLLM, which cuts linear layers alone. This file travels with the weights."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from dynmoe.hf.configuration_dynmoe import DynMoEConfig


class ServerRanks:
    """How many ranks of a server hold a slice of every expert each; one, where no server builds the model.

    transformers cuts experts by ``base_model_tp_plan`` when they are built; vLLM reads of it what it says of linear
    layers, and asks a module that has ``load_weights`` to take its own tensors.
    """

    def __init__(self, config: DynMoEConfig) -> None:
        self._group: Any = None
        if config._attn_implementation == "vllm":  # which vLLM says before it builds a model
            self._group = import_module("vllm.distributed").get_tp_group()

    @property
    def count(self) -> int:
        return 1 if self._group is None else int(self._group.world_size)

    def width(self, config: DynMoEConfig) -> int:
        """Neurons of each expert on this rank.

        Raises:
            ValueError: ranks that do not divide them.
        """
        width = config.moe_intermediate_size
        if width % self.count:
            problem = f"{self.count} ranks do not divide moe_intermediate_size={width}"
            raise ValueError(f"tensor_parallel_size={self.count}: {problem}; use a divisor")
        return width // self.count

    def load(self, experts: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Copies this rank's neurons of the tensors of a checkpoint; says which there were."""
        loaded = set()
        for name, whole in weights:
            rank, ranks = (0, 1) if self._group is None else (self._group.rank_in_group, self.count)
            if name == "down_proj":
                own = whole.chunk(ranks, dim=2)[rank]
            else:  # gate and up projection, one below the other
                own = whole.unflatten(1, (2, ranks, -1))[:, :, rank].flatten(1, 2)
            getattr(experts, name).data.copy_(own)
            loaded.add(name)
        return loaded

    def sum(self, y_TD: Tensor) -> Tensor:
        """Sum over the ranks."""
        return y_TD if self.count == 1 else self._group.all_reduce(y_TD)
