"""Comparisons for the tests of the fault matrix."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd

from tests.train.cases import TrainingProcess, curve, parameter_hashes

MEGATRON = ["engine=megatron", "parallel.expert=1", "parallel.pipeline=2"]


def is_undisturbed(run: Path, reference: Path, step: int = 40) -> None:
    """Checks that rows, events, histograms, traces and final parameters are bitwise those of ``reference``."""
    assert curve(run / "metrics.jsonl") == curve(reference / "metrics.jsonl")
    for name in ("events.jsonl", "histograms.jsonl"):
        assert (run / name).read_text() == (reference / name).read_text(), name
    assert incidents(run) == incidents(reference)
    assert pd.read_parquet(run / "traces").equals(pd.read_parquet(reference / "traces"))
    assert parameter_hashes(run, step) == parameter_hashes(reference, step)


def incidents(run: Path) -> list[str]:
    """Incidents of a run, without stragglers, which depend on the load of the machine."""
    lines = (run / "incidents.jsonl").read_text().splitlines()
    return [line for line in lines if json.loads(line)["kind"] != "straggler"]


def errors(process: TrainingProcess) -> list[str]:
    """The error lines that a run has printed."""
    return [line for line in process.output().splitlines() if line.startswith("error: ")]
