"""Units of the comparison: one training run each, trained in its own process, kept as one JSON file."""

from __future__ import annotations

import json
import platform
import re
import shutil
import statistics
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench.report import current_commit
from bench.routing.methods import METHODS
from bench.trainings import problem_in, start
from dynmoe.data.corpus import MANIFEST
from dynmoe.errors import UserError

_POINTS = 24
_EXPERTS = "experts_per_token_mean"
# After three quarters of a run the number of experts has settled.
_SETTLED_SHARE = 0.75


@dataclass(frozen=True)
class Cell:
    """A size of the model and a corpus; methods are compared within a cell."""

    width: int
    corpus: str

    def __str__(self) -> str:
        return f"width {self.width}, {self.corpus}"


@dataclass(frozen=True)
class Unit:
    """A training run: everything that distinguishes it from the others."""

    cell: Cell
    method: str
    learning_rate: float
    seed: int
    steps: int

    @property
    def path(self) -> Path:
        """Its file below the directory of the evidence."""
        method = re.sub(r"[^a-z0-9.]+", "-", self.method.lower())
        name = f"{method}_lr{self.learning_rate:g}_seed{self.seed}_{self.steps}.json"
        return Path(f"{self.cell.corpus}-{self.cell.width}", name)

    @property
    def overrides(self) -> list[str]:
        """Fields of the configuration that define the run, without those of files and processes."""
        return [
            f"model.hidden={self.cell.width}", f"model.moe.expert_hidden={self.cell.width}", "train.global_batch=8",
            f"train.steps={self.steps}", f"train.seed={self.seed}", f"optimizer.lr={self.learning_rate:g}",
            "eval.batches=32", *METHODS[self.method],
        ]  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What a unit measured. Lists run over layers; rows of ``curve`` are means over equal parts of the run.

    Attributes:
        loss: validation loss in nats per token.
        flops: matrix-product FLOPs of the whole training, from the measured routed rows.
        experts: mean experts per token over the training, all layers.
        experts_settled: the same over the last quarter of the training, by layer.
        experts_evaluated: experts per token on the validation text, all layers.
        load_max_over_mean: load of the busiest expert over the mean load, last quarter of the training, all layers.
    """

    loss: float
    flops: int
    tokens: int
    experts: float
    experts_settled: list[float]
    experts_evaluated: float
    load_max_over_mean: float
    curve: list[dict[str, Any]]


class Evidence:
    """The finished units below a directory; trains missing ones.

    Args:
        directory: directory of the JSON files.
        corpora: directory of each corpus, needed for training only.
        scratch: parent of the run directories, each of which is removed when its unit is finished.
    """

    def __init__(self, directory: Path, corpora: Mapping[str, Path], scratch: Path) -> None:
        self._directory = directory
        self._corpora = corpora
        self._scratch = scratch

    def get(self, unit: Unit) -> Outcome | None:
        """The outcome of ``unit``, None if it has not been trained.

        Raises:
            UserError: the unit was trained with other fields or another text.
        """
        path = self._directory / unit.path
        if not path.exists():
            return None
        kept = json.loads(path.read_text())
        if kept["overrides"] != unit.overrides:
            raise UserError(f"{path}: was trained with other fields; use another directory for --evidence")
        corpus = self._corpora.get(unit.cell.corpus)
        if corpus is not None and (corpus / MANIFEST).exists() and kept["text"] != fingerprint(corpus):
            raise UserError(f"{path}: was trained on another text than {corpus}; use another directory for --evidence")
        return Outcome(**kept["outcome"])

    def train(self, unit: Unit) -> None:
        """Trains ``unit`` in its own process on one core and keeps its outcome.

        Raises:
            UserError: the training failed.
        """
        corpus = self._corpora[unit.cell.corpus]
        run = self._scratch / f"{unit.path.parent}_{unit.path.stem}"
        overrides = [*unit.overrides, "eval.domains=true", "checkpoint.interval=0"]
        commit = current_commit()
        process = start(run, corpus, overrides, subprocess.PIPE)
        output, _ = process.communicate()
        if process.returncode:
            raise UserError(f"{unit.path}: {problem_in(output)}")
        self._keep(unit, run, fingerprint(corpus), commit)
        shutil.rmtree(run)

    def _keep(self, unit: Unit, run: Path, text: str, commit: str) -> None:
        kept = {"unit": asdict(unit), "overrides": unit.overrides, "text": text, "versions": versions(commit),
                "outcome": asdict(outcome_of(read_rows(run)))}  # fmt: skip
        write_evidence(self._directory / unit.path, json.dumps(_rounded(kept)))


def versions(commit: str) -> dict[str, str]:
    """What evidence records about the code that made it; ``commit`` is that of its start."""
    return {"python": platform.python_version(), "torch": torch.__version__, "commit": commit}


def write_evidence(path: Path, content: str) -> None:
    """Writes evidence, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".tmp")
    partial.write_text(content + "\n")
    partial.rename(path)


def read_rows(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def with_loss(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows without those of steps that were skipped, which have no loss and no routing."""
    return [row for row in rows if "train/lm_loss" in row]


def outcome_of(rows: list[dict[str, Any]]) -> Outcome:
    """The outcome of a run from its rows (:func:`read_rows`), one for each step."""
    last = rows[-1]
    rows = with_loss(rows)
    settled = rows[int(_SETTLED_SHARE * len(rows)) :]
    (evaluated,) = (value for name, value in last.items() if re.fullmatch(rf"eval/domains/.*/{_EXPERTS}", name))
    parts = [rows[len(rows) * i // _POINTS : len(rows) * (i + 1) // _POINTS] for i in range(_POINTS)]
    return Outcome(
        loss=last["eval/loss"],
        flops=last["train/cumulative_flops"],
        tokens=last["train/tokens"],
        experts=_mean(rows, f"moe/{_EXPERTS}"),
        experts_settled=_by_layer(settled),
        experts_evaluated=evaluated,
        load_max_over_mean=_mean(settled, "moe/load_max_over_mean"),
        curve=[
            {"tokens": part[-1]["train/tokens"], "loss": _mean(part, "train/lm_loss"), "experts": _by_layer(part)}
            for part in parts
            if part
        ],
    )


def _by_layer(rows: list[dict[str, Any]]) -> list[float]:
    names = sorted(name for name in rows[0] if re.fullmatch(rf"moe/layer_\d+/{_EXPERTS}", name))
    return [_mean(rows, name) for name in names]


def _mean(rows: list[dict[str, Any]], name: str) -> float:
    return statistics.mean(row[name] for row in rows)


def _rounded(value: Any) -> Any:
    """The same with floats of six significant digits, which is more than one run determines."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {name: _rounded(own) for name, own in value.items()}
    return [_rounded(own) for own in value] if isinstance(value, list) else value


def fingerprint(corpus: Path) -> str:
    """SHA-256 of the corpus's training tokens, from its manifest."""
    return str(json.loads((corpus / MANIFEST).read_text())["files"]["train.bin"]["sha256"])
