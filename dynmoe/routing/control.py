"""How a budget of experts per token is held between optimizer steps: formulas on numbers, all outside autograd."""

from __future__ import annotations

import torch
from torch import Tensor


def scheduled_target(target: float, start: float | None, over_steps: int, step: int) -> float:
    """Experts per token wanted after optimizer step ``step``: linear from ``start`` to ``target``, then constant."""
    if start is None or step >= over_steps:
        return target
    return start + (target - start) * step / over_steps


def budget_error(experts_per_token: Tensor, target: float) -> Tensor:
    """1 - K / target, at least -1: positive where more experts are wanted.

    Linear in K about the target, so that it is the mean of K that is held, however much K varies from step to step.
    """
    return (1.0 - experts_per_token / target).clamp(min=-1.0)


def pi_change(error: Tensor, previous_error: Tensor, proportional: float, integral: float) -> Tensor:
    """Change of the control variable by a proportional-integral controller in velocity form.

    As only changes are added to a variable that is kept within its range, nothing winds up while it is at a limit.
    """
    return proportional * (error - previous_error) + integral * error


def shift_probability(p: Tensor, change: Tensor) -> Tensor:
    """p moved by ``change`` on the logit scale, and kept within [1e-4, 1 - 1e-4]."""
    return torch.sigmoid(torch.logit(p) + change).clamp(1e-4, 1.0 - 1e-4)


def threshold_change(share_E: Tensor, target_share: Tensor | float, rate: float) -> Tensor:
    """How far each expert's threshold moves, in units of a score's deviation: ``rate`` × its relative excess.

    The excess (share / target - 1) is clamped to [-1, 1], so that an expert that takes everything is not pushed
    harder than one that takes nothing is pulled.
    """
    return rate * (share_E / target_share - 1.0).clamp(-1.0, 1.0)


def bias_change(selected_E: Tensor, rate: float) -> Tensor:
    """Loss-free balancing of top-k (arXiv 2408.15664, algorithm 1): rate × sign(mean load - load)."""
    return rate * torch.sign(selected_E.mean() - selected_E)
