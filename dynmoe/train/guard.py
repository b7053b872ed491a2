"""Steps that must not reach the optimizer: those without a finite loss and gradient, and spikes of the loss."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

from dynmoe.config.guard import GuardConfig
from dynmoe.train.engine import Gradients

# A window of equal losses has no deviation; what lies within this part of their mean is no spike.
_LEAST_DEVIATION = 1e-3


@dataclass
class GuardState:
    """What the guard goes by; part of every checkpoint.

    Attributes:
        skipped_steps: steps of the run whose update was left out.
        bad_in_a_row: latest steps that were not finite.
        spikes_in_a_row: latest steps that were left out as spikes.
        losses: of the latest steps that were taken, at most ``guard.spike_window``.
    """

    skipped_steps: int = 0
    bad_in_a_row: int = 0
    spikes_in_a_row: int = 0
    losses: list[float] = field(default_factory=list)


class StepGuard:
    """Decides whether a step's gradients are used. Every rank has the same figures, and so decides alike.

    Args:
        config: limits.
        state: to go on from; it is changed.
    """

    def __init__(self, config: GuardConfig, state: GuardState) -> None:
        self.config, self.state = config, state

    def is_bad(self, gradients: Gradients) -> bool:
        """Whether a step is not finite: it is left out, and leaves no trace in the window of losses."""
        if gradients.finite:
            self.state.bad_in_a_row = 0
            return False
        self.state.bad_in_a_row += 1
        self.state.skipped_steps += 1
        return True

    @property
    def gives_up(self) -> bool:
        """Whether so many steps in a row were not finite that going on makes no sense."""
        return self.state.bad_in_a_row >= self.config.bad_steps

    def spike(self, gradients: Gradients) -> str | None:
        """Why a finite step is left out, in words; None for one that is taken, whose loss the window then has.

        After ``guard.spike_skips`` in a row the next step is taken, and the window begins anew.
        """
        config, state, loss = self.config, self.state, gradients.lm_loss
        if not config.spike_window:
            return None
        if len(state.losses) >= config.spike_window:
            mean = statistics.fmean(state.losses)
            deviation = max(statistics.pstdev(state.losses, mean), _LEAST_DEVIATION * abs(mean))
            limit = mean + config.spike_deviations * deviation
            if loss > limit and state.spikes_in_a_row < config.spike_skips:
                state.spikes_in_a_row += 1
                state.skipped_steps += 1
                which = f"{state.spikes_in_a_row} of at most {config.spike_skips}"
                return f"loss {loss:.4g} is above {limit:.4g}, its limit after {mean:.4g}; left out ({which})"
            if loss > limit:
                state.losses.clear()
        state.spikes_in_a_row = 0
        state.losses = [*state.losses, loss][-config.spike_window :]
        return None
