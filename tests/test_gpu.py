"""What only a GPU can show. Without one every test here is skipped, with that reason."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dynmoe.moe import MoEContext, MoELayer
from tests.moe.cases import HIDDEN, ROUTERS, run_layer, spread_router, tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")]


@pytest.mark.parametrize("kind", sorted(ROUTERS))
@pytest.mark.parametrize("tokens", [0, 1, 64])
def test_the_layer_in_bf16_agrees_with_fp32_on_the_cpu(kind, tokens):
    torch.manual_seed(0)
    x, upstream = torch.randn(tokens, HIDDEN).bfloat16(), torch.randn(tokens, HIDDEN).bfloat16()
    results = []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        layer = MoELayer(tiny_model(*ROUTERS[kind], "model.hidden=16"), 0, 0, MoEContext(recording=True))
        spread_router(layer)
        layer.bfloat16().to(device, dtype)  # the same rounded weights on both
        results.append(run_layer(layer, x.to(device, dtype), upstream.to(device, dtype)))
    for name, exact in results[0].items():
        ours = results[1][name].cpu().float()
        assert (ours - exact).norm() <= 2e-2 * exact.norm() + 1e-6, name


def test_both_engines_train_alike_in_bf16():
    """The smoke run with a small model; ``python -m bench gpu_smoke`` is the large one."""
    sizes = ["--layers", "4", "--hidden", "256", "--heads", "4", "--width", "256", "--length", "256", "--steps", "20"]
    done = subprocess.run(
        [sys.executable, "-m", "bench", "gpu_smoke", *sizes],
        capture_output=True, text=True, check=False, timeout=300, cwd=Path(__file__).parents[1],
        env={name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "losses of the two engines agree" in done.stdout
