"""When and how checkpoints are written, and which ones are kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dynmoe.fields import Section, option


@dataclass
class CheckpointConfig(Section):
    _section: ClassVar[str] = "checkpoint"

    interval: int = option(
        200, "steps between checkpoints (0: only at the end and after a stop request such as SIGTERM)", at_least=0
    )
    keep: int = option(2, "number of latest checkpoints to keep", at_least=2)
    milestones: int = option(0, "also keep checkpoints at multiples of this step (0: none)", at_least=0)
    accept_changes: list[str] = option(
        [], "fields or sections that may differ from those of the checkpoint from which the run resumes"
    )
    asynchronous: bool = option(False, "write checkpoints in the background from a copy in host memory")
