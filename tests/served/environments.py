"""What ``make test-served`` has installed, each in an environment of its own."""

from __future__ import annotations

from pathlib import Path

from bench.processes import ROOT

SERVED = ROOT / ".venv-served"
# Unpacked from transformers' source distribution, and the one package that its tests need beside ours.
THEIR_TESTS, PARAMETERIZED = SERVED / "transformers" / "tests", SERVED / "parameterized"


def installed(path: Path) -> Path:
    """``path``, which must be there."""
    assert path.exists(), f"{path.relative_to(ROOT)} is not there: make test-served installs it"
    return path


def python_of(client: str) -> Path:
    """The interpreter of ``vllm``, ``mlx`` or ``llama``."""
    return installed(SERVED / client / "bin" / "python")
