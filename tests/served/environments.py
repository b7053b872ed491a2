"""What ``make test-served`` has installed, each in an environment of its own."""

from __future__ import annotations

import os
from pathlib import Path

from harness.processes import CPU, ROOT

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


def variables(folder: Path) -> dict[str, str]:
    """What a client is started with: on a CPU, nothing from the hub, its caches below ``folder``."""
    caches = {"HF_HOME": str(folder / "hf"), "XDG_CACHE_HOME": str(folder / "cache")}
    vllm = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_DO_NOT_TRACK": "1"}
    return os.environ | CPU | {"HF_HUB_OFFLINE": "1"} | caches | vllm
