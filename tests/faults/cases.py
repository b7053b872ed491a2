"""What the rows of the fault matrix compare with."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.train.cases import TrainingProcess, curve, parameter_hashes


def both_ways(fast: tuple[str, str]) -> list[Any]:
    """Engine, and whether it saves asynchronously; all but ``fast`` are slow."""
    ways = itertools.product(("deepspeed", "megatron"), ("true", "false"))
    return [pytest.param(*way, marks=() if way == fast else pytest.mark.slow) for way in ways]


MEGATRON = ["engine=megatron", "parallel.expert=1", "parallel.pipeline=2"]


def is_undisturbed(run: Path, reference: Path, step: int = 40) -> None:
    """Rows, events, histograms, traces and final parameters are those of ``reference``, bit by bit."""
    assert curve(run / "metrics.jsonl") == curve(reference / "metrics.jsonl")
    for name in ("events.jsonl", "histograms.jsonl"):
        assert (run / name).read_text() == (reference / name).read_text(), name
    assert incidents(run) == incidents(reference)
    assert pd.read_parquet(run / "traces").equals(pd.read_parquet(reference / "traces"))
    assert parameter_hashes(run, step) == parameter_hashes(reference, step)


def incidents(run: Path) -> list[str]:
    """What a run met, but for stragglers: those are of the machine, and of what else runs there."""
    lines = (run / "incidents.jsonl").read_text().splitlines()
    return [line for line in lines if json.loads(line)["kind"] != "straggler"]


def errors(process: TrainingProcess) -> list[str]:
    """What a run told its user to mend."""
    return [line for line in process.output().splitlines() if line.startswith("error: ")]
