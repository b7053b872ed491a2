"""Compiles every kernel that a layer launches, for GPUs that need not be here: python -m harness.machine_code 90 ...

The backend runs on meta tensors with a pretended GPU driver, so that what is compiled is what a layer of these sizes
launches: the same tiles, constants and alignments. Prints a JSON list of ``Compiled``. Kernels under
TRITON_INTERPRET have no machine code.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from harness.plans import Shape
from harness.sass import read

# Fine-grained experts, few wide ones, many narrow ones, and a small layer: sizes and experts per token.
SHAPES = {
    "fine": (Shape(32768, 2048, 1408, 64), 6),
    "wide": (Shape(16384, 1024, 2816, 16), 2),
    "many": (Shape(32768, 2048, 768, 128), 8),
    "small": (Shape(4096, 512, 1024, 16), 2),
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Card:
    """Resources of a GPU; data of one multiprocessor unless said otherwise.

    From NVIDIA's CUDA C++ Programming Guide (technical specifications by compute capability). Each has 65536 registers.
    Speeds are those of the product that NVIDIA's data sheets name: dense bf16 and memory.
    """

    name: str
    shared_bytes: int  # of one block; the multiprocessor reserves another KiB for each
    multiprocessor_bytes: int
    threads: int
    multiprocessors: int
    tflops: float
    terabytes_per_second: float
    clock_ghz: float
    matrix: str  # its fastest matrix instruction


KIB = 1024
CARDS = {
    80: Card("A100", 163 * KIB, 164 * KIB, 2048, 108, 312, 2.039, 1.41, "HMMA"),
    90: Card("H100", 227 * KIB, 228 * KIB, 2048, 132, 989, 3.35, 1.83, "HGMMA"),
    100: Card("B200", 227 * KIB, 228 * KIB, 2048, 148, 2250, 8.0, 1.85, "UTCHMMA"),
    120: Card("RTX PRO 6000", 99 * KIB, 100 * KIB, 1536, 188, 504, 1.792, 2.62, "HMMA"),
}


@dataclass(frozen=True)
class Compiled:
    """A kernel for one card and dtype, and what its machine code tells.

    ``shapes``: the layers that launch it; ``arguments``: the constants by which it differs from other compilations of
    the kernel; ``loop``: opcodes of the inner loop.
    """

    kernel: str
    capability: int
    dtype: str
    shapes: tuple[str, ...]
    arguments: dict[str, Any]
    warps: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    blocks: int
    loop: dict[str, int]


class _PretendedDriver:
    """What Triton asks of a driver before it loads a kernel."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # Triton keeps compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def pretended_card(capability: int) -> Iterator[list[tuple[str, Any, dict[str, Any]]]]:
    """Launches compile for the card and do nothing else; yields the list of (kernel, compiled, constants) that they
    fill."""
    launched: list[tuple[str, Any, dict[str, Any]]] = []
    run = JITFunction.run
    active = driver._active

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **options)
        compiled = compiled.result() if hasattr(compiled, "result") else compiled
        constants = {name: value for name, value in options.items() if name.isupper()}
        launched.append((self.fn.__name__, compiled, constants))
        return compiled

    JITFunction.run = compile_only
    driver.set_active(_PretendedDriver(capability))
    try:
        yield launched
    finally:
        JITFunction.run = run
        driver._active = active


def launch_layer(shape: Shape, experts_per_token: int, dtype: torch.dtype) -> None:
    """Forward and backward pass of the routed experts on meta tensors, and a backward pass that adds to fp32 sums."""
    from dynmoe.ops.triton.backend import TritonBackend

    backend = TritonBackend()
    with torch.device("meta"):
        x_TD, grad_TD = torch.empty(2, shape.tokens, shape.hidden, dtype=dtype)
        gates_TE = torch.empty(shape.tokens, shape.experts)
        w_up_EHD = torch.empty(shape.experts, 2 * shape.width, shape.hidden, dtype=dtype)
        w_down_EDF = torch.empty(shape.experts, shape.hidden, shape.width, dtype=dtype)
        routing_map_TE = torch.empty(shape.tokens, shape.experts, dtype=torch.bool)
        permutation = backend.permutation(routing_map_TE, shape.tokens * experts_per_token)
        _, h_NH = backend.forward(x_TD, gates_TE, w_up_EHD, w_down_EDF, permutation)
        sums = torch.empty_like(w_up_EHD, dtype=torch.float32), torch.empty_like(w_down_EDF, dtype=torch.float32)
        for given in ((None, None), sums):
            backend.backward(grad_TD, h_NH, x_TD, gates_TE, w_up_EHD, w_down_EDF, permutation, sums=given)


def compile_layers(capability: int, dtype: str = "bf16", shapes: tuple[str, ...] = tuple(SHAPES)) -> list[Compiled]:
    """Compiles what layers of these shapes launch, each kernel once."""
    found: dict[str, Compiled] = {}
    for name in shapes:
        with pretended_card(capability) as launched:
            launch_layer(*SHAPES[name], DTYPES[dtype])
        for kernel, compiled, constants in launched:
            known = found.get(compiled.hash) or describe(kernel, compiled, capability, dtype, constants)
            found[compiled.hash] = replace(known, shapes=tuple(dict.fromkeys((*known.shapes, name))))
    return list(found.values())


def describe(kernel: str, compiled: Any, capability: int, dtype: str, constants: dict[str, Any]) -> Compiled:
    assert compiled.metadata.target.arch == capability
    code = read(compiled.asm["cubin"])
    warps = _warps(compiled)
    shared = compiled.metadata.shared
    blocks = blocks_per_multiprocessor(CARDS[capability], code.registers, shared, warps)
    options = {"warps": compiled.metadata.num_warps, "stages": compiled.metadata.num_stages}
    return Compiled(
        kernel.strip("_").removesuffix("_kernel"), capability, dtype, (), constants | options, warps, code.registers,
        code.spilled_bytes, shared, blocks, dict(code.inner_loop()),
    )  # fmt: skip


def _warps(compiled: Any) -> int:
    """Number of warps of a block, with those that specialization adds."""
    directive = next(line for line in compiled.asm["ptx"].splitlines() if line.startswith((".reqntid", ".maxntid")))
    return int(directive.split()[1].strip(",")) // 32


def blocks_per_multiprocessor(card: Card, registers: int, shared_bytes: int, warps: int) -> int:
    """Number of blocks that a multiprocessor holds at a time, by registers, shared memory and threads.

    Registers are given to warps 256 at a time. Each of the four parts of a multiprocessor holds a quarter of the
    registers and of the warps.
    """
    of_warp = -(-registers * 32 // 256) * 256
    by_registers = 4 * (65536 // 4 // of_warp) // warps
    by_shared = card.multiprocessor_bytes // (shared_bytes + KIB)
    return min(32, by_registers, by_shared, card.threads // (32 * warps))


def main() -> None:
    parser = argparse.ArgumentParser("python -m harness.machine_code")
    parser.add_argument("capabilities", nargs="+", type=int, choices=CARDS)
    parser.add_argument("--dtypes", nargs="+", default=["bf16"], choices=DTYPES)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    given = parser.parse_args()
    found = [
        compiled
        for capability in given.capabilities
        for dtype in given.dtypes
        for compiled in compile_layers(capability, dtype, tuple(given.shapes))
    ]
    print(json.dumps([asdict(compiled) for compiled in found]))


def from_json(text: str) -> list[Compiled]:
    """What ``main`` printed."""
    rows = json.loads(text)
    return [Compiled(**{**row, "shapes": tuple(row["shapes"]), "loop": Counter(row["loop"])}) for row in rows]


if __name__ == "__main__":
    main()
