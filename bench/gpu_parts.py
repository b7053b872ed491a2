"""One part of ``bench gpu_day`` in a process of its own: python -m bench.gpu_parts NAME --rows FILE

Each row is written as soon as it is measured, so that those of a part that is stopped count. Without a GPU a part runs
in small: what can be wrong in it before it meets one goes wrong there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from bench import gpu_layer
from bench.gpu_layer import Case
from dynmoe.cli import run_tool
from dynmoe.ops.mxfp8 import CAPABILITY
from harness.plans import DEVICE

Rows = Iterator[dict[str, Any]]
# Exit status of a part that cannot run here.
SKIPPED = 77
_SMALL = DEVICE.type != "cuda"
_SMALL_CASES = [Case(8, 16, 16, 2, 1.0, goal="0.5 share")]
_DTYPE = "fp32" if _SMALL else "bf16"  # Triton's interpreter has no bf16
_REPEATS = 1 if _SMALL else 20


def kernels(_: float) -> Rows:
    from bench import gpu_kernels

    return gpu_kernels.measure()


def _layer(cases: list[Case], methods: tuple[str, ...]) -> Rows:
    return gpu_layer.measure(cases, methods, _DTYPE, _REPEATS, 64 if _SMALL else 8192)


def layer(_: float) -> Rows:
    return _layer(_SMALL_CASES if _SMALL else gpu_layer.CASES, ("grouped_mm", "triton"))


def engines(_: float) -> Rows:
    from bench import gpu_smoke

    parser = argparse.ArgumentParser()
    gpu_smoke.add_arguments(parser)
    return iter(gpu_smoke.run(parser.parse_args(["--steps", "5" if _SMALL else "50"])))


def grid(_: float) -> Rows:
    return _layer(_SMALL_CASES if _SMALL else gpu_layer.GRID, ("grouped_mm", "triton"))


def tiles(seconds: float) -> Rows:
    """Searches for a minute at most, and leaves time to start and to compile what is searched from."""
    from bench import gpu_tiles

    case = _SMALL_CASES[0] if _SMALL else gpu_layer.CASES[0]
    return gpu_tiles.search(case, _DTYPE, min(60.0, seconds / 2), min(_REPEATS, 5))


def sonic(_: float) -> Rows:
    from harness.sonic import sonic_anywhere

    if not _SMALL and find_spec("sonicmoe") is None:
        print("sonic-moe is not installed")
        raise SystemExit(SKIPPED)
    with sonic_anywhere() if _SMALL else nullcontext():
        yield from _layer(_SMALL_CASES if _SMALL else gpu_layer.CASES, ("sonic", "triton"))


def mxfp8(_: float) -> Rows:
    if _SMALL:
        yield from _layer([Case(8, 32, 32, 2, 1.0)], ("grouped_mm", "mxfp8_emulated"))
        return
    if torch.cuda.get_device_capability()[0] != CAPABILITY:
        print(f"{torch.cuda.get_device_name()} has no products with MXFP8 operands")
        raise SystemExit(SKIPPED)
    yield from _layer(gpu_layer.CASES, ("triton", "grouped_mm", "mxfp8"))


PARTS: dict[str, Callable[[float], Rows]] = {
    "kernels": kernels, "layer": layer, "engines": engines, "grid": grid, "tiles": tiles, "sonic": sonic,
    "mxfp8": mxfp8,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.gpu_parts", description=str(__doc__).splitlines()[0])
    parser.add_argument("name", choices=PARTS)
    parser.add_argument("--rows", type=Path, required=True, help="file to which rows are added, a JSON document each")
    parser.add_argument("--seconds", type=float, default=60.0, help="after which the part is stopped")
    given = parser.parse_args()
    with given.rows.open("a") as file:
        for row in PARTS[given.name](given.seconds):
            file.write(json.dumps(row) + "\n")
            file.flush()


if __name__ == "__main__":
    run_tool(main)
