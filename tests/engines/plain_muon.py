"""Muon for the plain model, written as one loop over single matrices in fp64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from dynmoe.config import Config
from dynmoe.model import Decoder


class PlainMuon:
    """Muon for each matrix of the decoder layers but the router's; torch's AdamW for the rest.

    Attributes:
        state: first moments, by parameter, like a torch optimizer's.
    """

    def __init__(self, model: Decoder, config: Config) -> None:
        self._settings = config.optimizer
        self._model = config.model
        named = dict(model.named_parameters())
        self._matrices = {
            name: p for name, p in named.items() if "layers." in name and p.dim() > 1 and ".router." not in name
        }
        rest = [p for name, p in named.items() if name not in self._matrices]
        decay = self._settings.weight_decay
        groups = [{"params": [p], "weight_decay": decay if p.dim() > 1 else 0.0} for p in rest]
        betas = (self._settings.beta1, self._settings.beta2)
        self._adam = torch.optim.AdamW(groups, lr=self._settings.lr, betas=betas, eps=self._settings.eps)
        self.state = {p: {"exp_avg": torch.zeros_like(p)} for p in self._matrices.values()}

    def zero_grad(self) -> None:
        self._adam.zero_grad()
        for parameter in self._matrices.values():
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        self._adam.step()
        self.state |= dict(self._adam.state)
        lr = self._settings.lr
        for name, parameter in self._matrices.items():
            average = self.state[parameter]["exp_avg"]
            average.mul_(self._settings.muon_momentum).add_(parameter.grad, alpha=1 - self._settings.muon_momentum)
            momentum = parameter.grad * (1 - self._settings.muon_momentum) + average * self._settings.muon_momentum
            parameter.mul_(1 - lr * self._settings.weight_decay)
            of_experts = [(parameter, momentum, parameter.grad)]
            if parameter.dim() == 3:
                of_experts = list(zip(parameter, momentum, parameter.grad, strict=True))
            for weight, direction, gradient in of_experts:
                if not gradient.any():
                    continue
                for rows in self._rows(name, len(weight)):
                    scale = 0.2 * math.sqrt(max(weight[rows].shape))
                    weight[rows] -= lr * scale * newton_schulz(direction[rows]).float()

    def _rows(self, name: str, rows: int) -> Iterator[slice]:
        ends = [0, rows]
        if name.endswith("w_qkv"):
            size = self._model.width_of_head
            queries = self._model.heads * size
            ends = [0, queries, queries + self._model.kv_heads * size, rows]
        elif "w_up" in name:
            ends = [0, rows // 2, rows]
        return (slice(start, end) for start, end in itertools.pairwise(ends))


def newton_schulz(matrix: Tensor) -> Tensor:
    x = matrix.double() / matrix.double().norm().clamp(min=1e-7)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x - 4.7750 * square @ x + 2.0315 * square @ square @ x
    return x
