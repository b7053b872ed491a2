"""How a budget of experts per token is held between optimizer steps: formulas on numbers, all outside autograd."""

from __future__ import annotations

import torch
from torch import Tensor


def scheduled_target(target: float, start: float | None, over_steps: int, step: int) -> float:
    """Experts per token wanted after optimizer step ``step``: linear from ``start`` to ``target``, then constant."""
    if start is None or step >= over_steps:
        return target
    return start + (target - start) * step / over_steps


def moving_average(average: Tensor, now: Tensor, decay: float = 0.9) -> Tensor:
    """decay * average + (1 - decay) * now; ``now`` itself while the average, of positive numbers, still is 0."""
    return torch.where(average > 0, decay * average + (1 - decay) * now, now)


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


def balance_change(selected_E: Tensor, active_E: Tensor, rate: float) -> Tensor:
    """How far each active expert's threshold moves for the balance alone: ``rate`` × its excess over the mean load.

    The excess (load / mean - 1) is clamped to [-1, 1], so that an expert that takes everything is not pushed harder
    than one that takes nothing is pulled. What the clamp leaves of its mean over experts is taken off again: the
    budget is not this rule's business, and heavy loads, which it cuts, would make it hold too many experts.
    """
    active = active_E.to(selected_E.dtype)
    count = active.sum()
    mean_load = (selected_E * active).sum() / count
    excess_E = (selected_E / mean_load.clamp(min=1e-6) - 1.0).clamp(-1.0, 1.0) * active
    return rate * (excess_E - excess_E.sum() / count * active)


def bias_change(selected_E: Tensor, rate: float) -> Tensor:
    """Loss-free balancing of top-k (arXiv 2408.15664, algorithm 1): rate × sign(mean load - load)."""
    return rate * torch.sign(selected_E.mean() - selected_E)
