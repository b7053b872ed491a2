"""Comparison of runs: rows of metrics without times, and hashes of checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dynmoe.errors import UserError
from dynmoe.train.checkpoint import read_manifest

# Metrics that depend on time or on the machine.
_TIMED = ("train/step_time_s", "train/tokens_per_s", "train/tflops_per_rank", "train/wall_clock_s", "memory/peak_gib")


def without_times(row: Mapping[str, float]) -> dict[str, str]:
    """A row without the metrics that depend on time, with floats as hexadecimal, so that equal means bitwise equal."""
    return {name: float(value).hex() for name, value in row.items() if not name.startswith(_TIMED)}


def tensor_hashes(saved: Path) -> dict[str, str]:
    """SHA-256 of the tensor files of a checkpoint, by name.

    Raises:
        UserError: the manifest is corrupt.
    """
    manifest = read_manifest(saved)
    if manifest is None:
        raise UserError(f"{saved}: the manifest is corrupt; compare another run")
    tensors = (".safetensors", ".distcp")
    return {name: facts["sha256"] for name, facts in manifest["files"].items() if name.endswith(tensors)}
