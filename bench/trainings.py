"""Training runs of the quickstart model on one core each, which the comparisons of quality start."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO

_CONFIG = Path("configs/quickstart.yaml")
_FIELDS = (
    "parallel.expert=1", "logging.interval=1", "logging.wandb=disabled", "logging.histograms_every=0",
    "eval.interval=0", "eval.sample_tokens=0",
    "data.documents=joined",  # as the first runs that stand in bench/evidence
)  # fmt: skip
_OF_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


def start(run: Path, corpus: Path, overrides: Sequence[str], output: int | IO[str]) -> subprocess.Popen[str]:
    """Starts, or resumes, the training in the directory ``run``; ``output`` receives what it says and its errors."""
    command = [
        sys.executable, "train.py", str(_CONFIG), *overrides, f"run.dir={run.parent}", f"run.name={run.name}",
        f"data.dirs=[{corpus}]", *_FIELDS,
    ]  # fmt: skip
    alone = {name: value for name, value in os.environ.items() if name not in _OF_LAUNCHERS}
    return subprocess.Popen(
        command, env=alone | {"OMP_NUM_THREADS": "1"}, text=True, stdout=output, stderr=subprocess.STDOUT
    )


def problem_in(output: str) -> str:
    """The last line of a failed training's output, which says what is wrong."""
    return (output.strip().splitlines() or ["no output"])[-1].removeprefix("error: ")
