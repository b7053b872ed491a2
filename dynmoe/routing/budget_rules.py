"""The rules by which a budget of experts per token moves a router's control value, all outside autograd."""

from __future__ import annotations

import torch
from torch import Tensor


def scheduled_target(target: float, start: float | None, over_steps: int, step: int) -> float:
    """Experts per token to reach after optimizer step ``step``: linear from ``start`` to ``target``, then constant."""
    if start is None or step >= over_steps:
        return target
    return start + (target - start) * step / over_steps


def moving_average(average: Tensor, now: Tensor, decay: float = 0.9) -> Tensor:
    """decay * average + (1 - decay) * now; ``now`` as long as the average, of positive numbers, is still 0."""
    return torch.where(average > 0, decay * average + (1 - decay) * now, now)


def budget_error(experts_per_token: Tensor, target: float) -> Tensor:
    """1 - K / target, at least -1: positive if more experts are wanted.

    It is linear in K around the target, so the controller holds the mean of K however much K varies between steps.
    """
    return (1.0 - experts_per_token / target).clamp(min=-1.0)


def pi_change(error: Tensor, previous_error: Tensor, proportional: float, integral: float) -> Tensor:
    """Change of a control value by a proportional-integral controller in velocity form.

    The controller only adds changes to a value that is clamped to its range, so there is no integral windup.
    """
    return proportional * (error - previous_error) + integral * error


def shift_probability(p: Tensor, change: Tensor) -> Tensor:
    """p moved by ``change`` on the logit scale, clamped to [1e-4, 1 - 1e-4]."""
    return torch.sigmoid(torch.logit(p) + change).clamp(1e-4, 1.0 - 1e-4)


def balance_change(selected_E: Tensor, active_E: Tensor, rate: float) -> Tensor:
    """Change of each active expert's threshold that balances the load: ``rate`` × its excess over the mean load.

    The excess (load / mean - 1) is clamped to [-1, 1], so an expert that takes everything is pushed no harder than an
    idle one is pulled. Clamping cuts heavy loads and would shift the mean change below 0, which would raise the number
    of experts per token. The mean over experts is therefore subtracted: the budget alone decides that number.
    """
    active = active_E.to(selected_E.dtype)
    count = active.sum()
    mean_load = (selected_E * active).sum() / count
    excess_E = (selected_E / mean_load.clamp(min=1e-6) - 1.0).clamp(-1.0, 1.0) * active
    return rate * (excess_E - excess_E.sum() / count * active)


def bias_change(selected_E: Tensor, rate: float) -> Tensor:
    """Loss-free balancing of top-k (arXiv 2408.15664, algorithm 1): rate × sign(mean load - load)."""
    return rate * torch.sign(selected_E.mean() - selected_E)
