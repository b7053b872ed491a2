"""A search for tiles of our Triton kernels that are faster on this GPU than those that ``choose_tiles`` picks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from bench.cases import Method, tokens_of
from bench.gpu_layer import Case, Experts, weights_of
from bench.timing import Passes, interleave
from dynmoe.errors import first_line
from dynmoe.ops.triton import backend as kernels
from dynmoe.ops.triton.gemm import Tiles
from harness.plans import spread_plan

_KINDS = ("up", "gradient", "rows", "weights")
_SIZES: dict[str, tuple[int, ...]] = {
    "rows": (16, 32, 64, 128), "columns": (32, 64, 128, 256), "depth": (16, 32, 64, 128), "warps": (4, 8),
    "stages": (2, 3, 4, 5),
}  # fmt: skip


def search(case: Case, dtype: str, seconds: float, repeats: int = 5) -> Iterator[dict[str, Any]]:
    """Yields the best tiles of one kind of kernel after another, each found with the best of those before."""
    end = time.monotonic() + seconds
    shape = case.shape
    x_TD, upstream_TD = tokens_of(shape, dtype)
    module = Experts("triton", spread_plan(shape, case.mean_k, case.load), *weights_of(shape, x_TD.dtype))
    timed = _repeated(Method("triton", module, module).timed(x_TD, upstream_TD), repeats)
    with _settings() as (settings, chosen):
        timed()  # asks for tiles of all kinds
        for number, kind in enumerate(_KINDS):
            until = time.monotonic() + (end - time.monotonic()) / (len(_KINDS) - number)
            yield _descend(kind, chosen[kind], settings, timed, until)


@contextmanager
def _settings() -> Iterator[tuple[dict[str, Tiles], dict[str, Tiles]]]:
    """Tiles that are used in place of the chosen ones, and the chosen ones, by kind."""
    original = kernels.choose_tiles
    settings: dict[str, Tiles] = {}
    chosen: dict[str, Tiles] = {}

    def choose(kind: str, num_rows: int, num_experts: int, dtype: torch.dtype, capability: int) -> Tiles:
        chosen[kind] = original(kind, num_rows, num_experts, dtype, capability)
        return settings.get(kind, chosen[kind])

    kernels.choose_tiles = choose
    try:
        yield settings, chosen
    finally:
        kernels.choose_tiles = original


def _descend(
    kind: str, start: Tiles, settings: dict[str, Tiles], timed: Callable[[], float], until: float
) -> dict[str, Any]:
    """Changes one size at a time, once at least, for as long as that helps and time is left; the best stays in
    ``settings``."""
    first = timed()
    best = start
    best_s = first
    tried = {start}
    waiting = list(_neighbours(start))
    while waiting and (len(tried) == 1 or time.monotonic() < until):
        tiles = waiting.pop(0)
        if tiles in tried:
            continue
        tried.add(tiles)
        settings[kind] = tiles
        try:
            seconds = timed()
        except Exception as error:  # tiles that exceed the GPU's resources
            print(f"{kind} {tiles}: {first_line(error)}", flush=True)
            continue
        if seconds < best_s:
            best = tiles
            best_s = seconds
            waiting = list(_neighbours(tiles))
    settings[kind] = best
    return {"kernel": kind, "chosen": str(start), "best": str(best), "over_chosen": best_s / first, "tried": len(tried)}


def _neighbours(tiles: Tiles) -> Iterator[Tiles]:
    for name, sizes in _SIZES.items():
        place = sizes.index(getattr(tiles, name))
        for other in sizes[max(place - 1, 0) : place] + sizes[place + 1 : place + 2]:
            yield replace(tiles, **{name: other})


def _repeated(timed: Callable[[], Passes], repeats: int) -> Callable[[], float]:
    """Gives the seconds of both passes of the layer, the median of some."""
    return lambda: statistics.median(p.of("both") for p in interleave({"": timed}, repeats)[""])
