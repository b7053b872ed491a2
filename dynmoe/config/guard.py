"""Reactions of a run to non-finite steps, loss spikes, hanging ranks and slow ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dynmoe.errors import ConfigError
from dynmoe.fields import Section, option


@dataclass
class GuardConfig(Section):
    _section: ClassVar[str] = "guard"

    max_consecutive_nonfinite_steps: int = option(
        3, "the run fails after this many consecutive steps with a non-finite loss or gradient; earlier ones are "
        "skipped", at_least=1,
    )  # fmt: skip
    spike_window: int = option(0, "number of recent losses that define a loss spike (0: no spike detection)")
    spike_deviations: float = option(
        6.0, "a loss is a spike if it exceeds the window's mean by more than this many standard deviations", above=0
    )
    spike_skips: int = option(3, "maximum number of consecutive steps that are skipped as spikes", at_least=1)
    hang_timeout_s: float = option(
        900.0, "a rank without progress for this many seconds reports where it waits and exits (0: never)", at_least=0
    )
    straggler_interval: int = option(20, "steps between comparisons of the ranks' speed (0: none)", at_least=0)
    straggler_ratio: float = option(
        1.5, "a rank is reported as slow if it takes this many times as long as the others in two consecutive "
        "intervals", above=1,
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.spike_window != 0 and self.spike_window < 8:
            problem = "is too short to tell a spike from noise"
            raise ConfigError("guard.spike_window", self.spike_window, problem, "use 0 or at least 8")
