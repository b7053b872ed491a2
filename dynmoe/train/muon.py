"""Muon for the matrices of hidden layers, AdamW for all other parameters.

Muon (Keller Jordan, https://kellerjordan.github.io/posts/muon; arXiv 2502.16982) replaces the momentum of a matrix by
the nearest semi-orthogonal matrix. ``torch.optim.Muon`` is the same rule for whole matrices; an engine's rank holds
parts of them, and experts are stacked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# Of the polynomial that is iterated, and the number of iterations; as in torch.optim.Muon.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_SMALLEST_NORM = 1e-7

# Replaces the momenta of the tensors of a parameter group by their updates, in place; takes also the gradients.
Orthogonalize = Callable[[Sequence[Tensor], Sequence[Tensor]], None]


def orthogonalize(x_NRC: Tensor) -> Tensor:
    """Moves the singular values of N matrices to about 1 by Newton-Schulz iterations, [N, R, C].

    A matrix of zeros stays one. The precision is that of the input; bf16 suffices.
    """
    a, b, c = _COEFFICIENTS
    is_tall = x_NRC.shape[1] > x_NRC.shape[2]
    x = x_NRC.mT if is_tall else x_NRC  # for the smaller Gram matrix
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=_SMALLEST_NORM)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def orthogonalization_flops(rows: int, columns: int) -> int:
    """FLOPs of :func:`orthogonalize` for one matrix, two per multiply-add."""
    small = min(rows, columns)
    large = max(rows, columns)
    return _ITERATIONS * (4 * small**2 * large + 2 * small**3)


def rms_factor(rows: int, columns: int) -> float:
    """Brings an orthogonal matrix to the root mean square of AdamW's updates, so that one learning rate serves both.

    Equation 4 of arXiv 2502.16982.
    """
    return 0.2 * math.sqrt(max(rows, columns))


class MuonAdamW(torch.optim.AdamW):
    """AdamW that updates the parameter groups with ``muon=True`` by Muon.

    Both keep an average of the gradients, ``exp_avg``; Muon keeps no second moment. Both decouple weight decay.

    Args:
        groups: parameter groups, each with a flag ``muon``. Each gets its index as ``number``.
        momentum: decay of Muon's average; the update is Nesterov's.
        options: of AdamW.

    Attributes:
        orthogonalize: of each group with ``muon=True``, by its ``number``; set before the first step.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], momentum: float, **options: Any) -> None:
        super().__init__([group | {"number": number} for number, group in enumerate(groups)], **options)
        self.momentum = momentum
        self.orthogonalize: dict[int, Orthogonalize] = {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group["muon"]:
                self._step_matrices(group)

    def _step_matrices(self, group: dict[str, Any]) -> None:
        tensors = group["params"]
        lr = group["lr"]
        updates = [self._momentum(tensor) for tensor in tensors]
        # Also without tensors: a rank may orthogonalize what others hold.
        self.orthogonalize[group["number"]](updates, [tensor.grad for tensor in tensors])
        for tensor, update in zip(tensors, updates, strict=True):
            tensor.mul_(1 - lr * group["weight_decay"]).add_(update, alpha=-lr)

    def _momentum(self, tensor: Tensor) -> Tensor:
        """Adds the gradient of a tensor to its average; returns Nesterov's momentum."""
        gradient = tensor.grad
        assert gradient is not None
        state = self.state[tensor]
        if not state:
            state.update({"step": torch.zeros(()), "exp_avg": torch.zeros_like(tensor)})
        state["step"] += 1
        average = state["exp_avg"].lerp_(gradient, 1 - self.momentum)
        return gradient.lerp(average, self.momentum)
