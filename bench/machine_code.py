"""Benchmark 17: machine code of our Triton kernels for GPUs that were not there, and what it allows at most.

Every kernel that a layer launches, compiled for four GPUs and three layers (T tokens, D hidden, F width, E experts, K
experts per token): fine T 32768, D 2048, F 1408, E 64, K 6; wide T 16384, D 1024, F 2816, E 16, K 2; many T 32768,
D 2048, F 768, E 128, K 8. Registers, shared memory and instructions are the largest of the three. "Others" are the
instructions of the inner loop for each matrix instruction; "blocks" run on a multiprocessor at a time.

The last columns estimate the share of the peak that a product reaches at most, by layer. The loop takes the longest of
its four demands: matrix units at the peak of the data sheet; one instruction per cycle from each of the four schedulers
of a multiprocessor; tiles of both operands at 47 bytes per cycle and multiprocessor from the L2 cache (A100's 5120
bytes per cycle, assumed for all); both operands once from memory. What it stores, and reads to store, comes on top at
the speed of the memory, unless several blocks of a multiprocessor overlap it. Latencies, ragged tiles, and clocks that
fall under load are not counted, so a GPU stays below. Nothing here was timed.
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import dataclass
from typing import Any

from bench.report import verdict
from dynmoe.errors import UserError
from harness.machine_code import CARDS, SHAPES, Card, Compiled, compile_layers
from harness.sass import groups, matrix_opcodes

_LAYERS = ("fine", "wide", "many")
# Bytes that a multiprocessor reads from the L2 cache in a cycle.
_L2_BYTES = 5120 / 108
# Share of the peak that both passes of the layer are to reach on an H100.
_WANTED = {"fine": 0.50, "wide": 0.60}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cards", nargs="+", type=int, default=list(CARDS), choices=list(CARDS))


@dataclass(frozen=True)
class Work:
    """What a product does for one layer: its sizes, and the numbers that the loop reads and that are moved after it."""

    rows: int
    columns: int
    depth: int
    read: int
    moved: int

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.columns * self.depth


def work_of(name: str, layer: str) -> Work:
    """With experts of equal load."""
    shape, k = SHAPES[layer]
    rows = shape.tokens * k
    hidden, width, experts = shape.hidden, shape.width, shape.experts
    tokens = shape.tokens * hidden
    up = 2 * experts * width * hidden
    down = experts * width * hidden
    return {
        "up": Work(rows, 2 * width, hidden, tokens + up, 3 * rows * width),
        "rows down": Work(rows, hidden, width, rows * width + down, rows * hidden),
        "activation gradient": Work(rows, width, hidden, tokens + down, 5 * rows * width),
        "rows input gradient": Work(rows, hidden, 2 * width, 2 * rows * width + up, rows * hidden),
        "weights down": Work(experts * hidden, width, rows // experts, tokens + rows * width, down),
        "weights up": Work(experts * 2 * width, hidden, rows // experts, 2 * rows * width + tokens, up),
    }[name]


def seconds_of(compiled: Compiled, work: Work, card: Card) -> float:
    """The least time of a product by the assumptions above."""
    tiles = compiled.arguments
    columns = tiles["COLUMNS"] * (2 if compiled.kernel == "up" else 1)
    iterations = work.flops / (2 * tiles["ROWS"] * columns * tiles["DEPTH"])
    cycles = card.multiprocessors * card.clock_ghz * 1e9
    bandwidth = card.terabytes_per_second * 1e12 / 2  # numbers of 2 bytes
    loop = max(
        work.flops / (card.tflops * 1e12),
        iterations * sum(compiled.loop.values()) * compiled.warps / 4 / cycles,
        iterations * 2 * tiles["DEPTH"] * (tiles["ROWS"] + columns) / _L2_BYTES / cycles,
        work.read / bandwidth,
    )
    epilogue = work.moved / bandwidth
    return loop + epilogue if compiled.blocks == 1 else max(loop, work.read / bandwidth + epilogue)


def name_of(compiled: Compiled) -> str:
    """The kernel's name and, where it serves two products, which."""
    name = compiled.kernel.replace("_", " ")
    if compiled.kernel == "rows":
        return f"{name} {'down' if compiled.arguments['LINEAR'] else 'input gradient'}"
    if compiled.kernel == "weights":
        return f"{name} {'down' if compiled.arguments['GATHER_A'] else 'up'}"
    return name


def run(given: argparse.Namespace) -> list[dict[str, Any]]:
    import triton

    if triton.knobs.runtime.interpret:
        raise UserError("bench machine_code: TRITON_INTERPRET is set, so there is no machine code; unset it")
    rows = []
    for capability in given.cards:
        found = compile_layers(capability, shapes=_LAYERS)
        for name in dict.fromkeys(map(name_of, found)):
            rows.append(_row(name, [compiled for compiled in found if name_of(compiled) == name], triton.__version__))
    return rows


def _row(name: str, variants: list[Compiled], version: str) -> dict[str, Any]:
    """One kernel for one card: the largest figures of its compilations."""
    card = CARDS[variants[0].capability]
    row: dict[str, Any] = {
        "triton": version, "gpu": card.name, "kernel": name,
        "registers": max(c.registers for c in variants), "spilled": max(c.spilled_bytes for c in variants),
        "shared_kib": max(-(-c.shared_bytes // 1024) for c in variants), "blocks": min(c.blocks for c in variants),
    }  # fmt: skip
    products = [c for c in variants if c.loop]
    if not products:
        return row
    worst = max(products, key=_others)
    copied = groups(Counter(worst.loop))
    row |= {
        "matrix": ", ".join(f"{times} {code}" for code, times in matrix_opcodes(Counter(worst.loop)).items()),
        "others": _others(worst),
        "copies": ", ".join(f"{copied[group]} {group}" for group in sorted(copied) if "copy" in group),
    }
    for layer in _LAYERS:
        compiled = next(c for c in products if layer in c.shapes)
        work = work_of(name, layer)
        row[layer] = work.flops / (seconds_of(compiled, work, card) * card.tflops * 1e12)
    return row


def _others(compiled: Compiled) -> float:
    loop = Counter(compiled.loop)
    return loop.total() / matrix_opcodes(loop).total() - 1


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """Spilled bytes, and the share of the peak that the whole layer can reach."""
    said = [verdict("bytes spilled by all kernels", sum(row["spilled"] for row in rows), 0)]
    for gpu in dict.fromkeys(row["gpu"] for row in rows):
        products = [row for row in rows if row["gpu"] == gpu and "matrix" in row]
        for layer in _LAYERS:
            flops = sum(work_of(row["kernel"], layer).flops for row in products)
            share = flops / sum(work_of(row["kernel"], layer).flops / row[layer] for row in products)
            wanted = f", wanted on a GPU: {_WANTED[layer]:.2f}" if gpu == "H100" and layer in _WANTED else ""
            said.append(f"{gpu}, {layer}: both passes of the layer reach at most {share:.2f} of the peak{wanted}")
    return said
