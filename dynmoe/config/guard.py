"""What a run does about steps that go wrong, ranks that hang and ranks that are slow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dynmoe.config.fields import Section, option
from dynmoe.errors import ConfigError


@dataclass
class GuardConfig(Section):
    _section: ClassVar[str] = "guard"

    bad_steps: int = option(
        3, "steps in a row without a finite loss and gradient that end the run; those before are left out", at_least=1
    )
    spike_window: int = option(0, "latest losses that a step's loss is compared with (0: no step is left out for it)")
    spike_deviations: float = option(
        6.0, "standard deviations above the mean of the window from which on a loss is a spike", above=0
    )
    spike_skips: int = option(3, "steps of one spike that are left out at most", at_least=1)
    hang_timeout_s: float = option(
        900.0, "seconds without progress after which a rank reports where it waits, and ends (0: never)", at_least=0
    )
    straggler_interval: int = option(20, "steps between comparisons of the ranks' speed (0: none)", at_least=0)
    straggler_ratio: float = option(
        1.5, "a rank that needs so many times the others' time is named, in the second interval in a row", above=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.spike_window != 0 and self.spike_window < 8:
            problem, cure = "is too short to tell a spike from noise", "use 0 or at least 8"
            raise ConfigError("guard.spike_window", self.spike_window, problem, cure)
