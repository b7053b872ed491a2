"""Steps that must not reach the optimizer: those with a non-finite loss or gradient, and loss spikes."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

from dynmoe.config.guard import GuardConfig
from dynmoe.train.engine import Gradients

# Least standard deviation, relative to the mean: a window of equal losses has none, and noise is not a spike.
_LEAST_DEVIATION = 1e-3


@dataclass
class GuardState:
    """State of the guard; part of every checkpoint.

    Attributes:
        skipped_steps: number of steps of the run without an update.
        bad_in_a_row: latest consecutive steps that were not finite.
        spikes_in_a_row: latest consecutive steps that were skipped as spikes.
        losses: losses of the latest steps that were not skipped, at most ``guard.spike_window``.
    """

    skipped_steps: int = 0
    bad_in_a_row: int = 0
    spikes_in_a_row: int = 0
    losses: list[float] = field(default_factory=list)


class StepGuard:
    """Decides whether a step is skipped. All ranks see the same loss and norm, so they decide alike.

    Args:
        config: limits.
        state: state to resume from; it is modified.
    """

    def __init__(self, config: GuardConfig, state: GuardState) -> None:
        self.config = config
        self.state = state

    def is_nonfinite(self, gradients: Gradients) -> bool:
        """Whether loss or gradient is not finite: the step must be skipped, and the loss window ignores it."""
        if gradients.finite:
            self.state.bad_in_a_row = 0
            return False
        self.state.bad_in_a_row += 1
        self.state.skipped_steps += 1
        return True

    @property
    def gives_up(self) -> bool:
        """Whether too many consecutive steps were not finite to continue."""
        return self.state.bad_in_a_row >= self.config.max_consecutive_nonfinite_steps

    def spike(self, gradients: Gradients) -> str | None:
        """Why a finite step is skipped as a spike; None for a step that is used, whose loss joins the window.

        After ``guard.spike_skips`` consecutive skips the next step is used, and a new window begins.
        """
        config = self.config
        state = self.state
        loss = gradients.lm_loss
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
                return f"loss {loss:.4g} is above the limit {limit:.4g} (recent mean {mean:.4g}); skipped ({which})"
            if loss > limit:
                state.losses.clear()
        state.spikes_in_a_row = 0
        state.losses = [*state.losses, loss][-config.spike_window :]
        return None
