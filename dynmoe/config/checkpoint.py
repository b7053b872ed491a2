"""When checkpoints are written, how, and which of them stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dynmoe.config.fields import Section, option


@dataclass
class CheckpointConfig(Section):
    _section: ClassVar[str] = "checkpoint"

    interval: int = option(200, "steps between checkpoints (0: only at the end and on SIGTERM)", at_least=0)
    keep: int = option(2, "newest checkpoints that are kept", at_least=2)
    milestones: int = option(0, "checkpoints of a step that is a multiple of it are kept too (0: none)", at_least=0)
    accept_changes: list[str] = option(
        [], "fields, or sections, in which this start may differ from the checkpoint that it goes on from"
    )
    asynchronous: bool = option(False, "write checkpoints beside the steps that follow, from a copy in host memory")
