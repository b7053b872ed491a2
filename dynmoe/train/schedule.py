"""The learning rate schedule."""

from __future__ import annotations

import math

from dynmoe.config import OptimizerConfig, ScheduleConfig


def learning_rate(step: int, steps: int, optimizer: OptimizerConfig, schedule: ScheduleConfig) -> float:
    """Learning rate of step ``step`` (the first is 1) in a run of ``steps`` steps.

    Linear warmup, then ``cosine`` decay to the floor, ``wsd`` (constant, then linear decay to the floor over the last
    ``decay_fraction`` of all steps) or ``constant``.
    """
    if step <= schedule.warmup_steps:
        return optimizer.lr * step / schedule.warmup_steps
    floor = optimizer.lr * schedule.min_lr_ratio
    if schedule.kind == "cosine":
        progress = (step - schedule.warmup_steps) / max(1, steps - schedule.warmup_steps)
        return floor + (optimizer.lr - floor) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    if schedule.kind == "wsd":
        decay_steps = max(1, round(schedule.decay_fraction * steps))
        left = min(1.0, (steps - step) / decay_steps)
        return floor + (optimizer.lr - floor) * max(0.0, left)
    return optimizer.lr
