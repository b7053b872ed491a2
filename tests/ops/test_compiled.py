"""Our kernels compile for GPUs that are not here. What they give is tested in Triton's interpreter (test_triton.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from harness.processes import ROOT

# Shared memory of one block, from NVIDIA's CUDA C++ Programming Guide: compute capability 8.0 and 9.0.
SHARED_BYTES = {"80": 163 * 1024, "90": 227 * 1024}


@pytest.mark.slow
def test_kernels_compile_for_a100_and_h100_and_their_tiles_fit(tmp_path):
    """In a process of its own: here they are for the interpreter."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.compile_kernels", *SHARED_BYTES], cwd=ROOT, env=environment, check=False,
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for capability, kernels in json.loads(done.stdout).items():
        assert len(kernels) == 20
        for name, shared in kernels.items():
            assert shared <= SHARED_BYTES[capability], f"{name}: {shared} bytes for sm_{capability}"
