"""The environments that ``make test-served`` installs."""

from __future__ import annotations

import os
from pathlib import Path

from harness.processes import CPU, ROOT

SERVED = ROOT / ".venv-served"
# Unpacked from transformers' source distribution, and the one additional package that its tests require.
THEIR_TESTS = SERVED / "transformers" / "tests"
PARAMETERIZED = SERVED / "parameterized"


def installed(path: Path) -> Path:
    """Returns ``path``, which must exist."""
    assert path.exists(), f"{path.relative_to(ROOT)} does not exist: make test-served installs it"
    return path


def python_of(client: str) -> Path:
    """The interpreter of ``vllm``, ``mlx`` or ``llama``."""
    return installed(SERVED / client / "bin" / "python")


def variables(folder: Path) -> dict[str, str]:
    """Environment variables of a client: CPU only, offline, caches in ``folder``."""
    caches = {"HF_HOME": str(folder / "hf"), "XDG_CACHE_HOME": str(folder / "cache")}
    vllm = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_DO_NOT_TRACK": "1"}
    return os.environ | CPU | {"HF_HUB_OFFLINE": "1"} | caches | vllm
