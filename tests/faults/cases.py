"""What the rows of the fault matrix compare with."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd

from tests.train.cases import TrainingProcess, curve, parameter_hashes

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
