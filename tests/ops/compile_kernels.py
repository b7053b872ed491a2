"""Compiles our kernels for GPUs that need not be here: python -m tests.ops.compile_kernels CAPABILITY ...

Prints the shared memory of each in bytes, as JSON by capability and kernel. With TRITON_INTERPRET there is nothing to
compile.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dynmoe.ops.triton import backend, combine, gemm, routes

EXPERTS = 16
ROWS_OF_EXPERT = 512
_PRECISION = {torch.bfloat16: "tf32", torch.float32: "ieee"}


def kernels(dtype: torch.dtype) -> Iterator[tuple[str, Any, str, dict[str, Any], dict[str, int]]]:
    """Each kernel by name, with the types of its arguments (1: the stride of what lies side by side), its constants and
    its options, as a layer of wide experts launches it."""
    short = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}[dtype]

    def sizes(tiles: gemm.Tiles) -> tuple[dict[str, Any], dict[str, int]]:
        shape = {"ROWS": tiles.rows, "COLUMNS": tiles.columns, "DEPTH": tiles.depth, "PRECISION": _PRECISION[dtype]}
        return {"E": EXPERTS, **shape}, {"num_warps": tiles.warps, "num_stages": tiles.stages}

    padded = {"E_PAD": EXPERTS}
    num_rows = EXPERTS * ROWS_OF_EXPERT
    constants, options = sizes(backend.choose_tiles(num_rows, EXPERTS, dtype, fused=True))
    inputs = f"{short} *i32 *i32 *fp32 {short} {short} {short}"
    yield "up", gemm._up_kernel, f"{inputs} *i32 i32 i32", constants | padded, options
    gradient = gemm._activation_gradient_kernel
    yield "activation gradient", gradient, f"{inputs} *fp32 *i32 i32 i32", constants | padded, options
    constants, options = sizes(backend.choose_tiles(num_rows, EXPERTS, dtype, fused=False))
    for side, strides in (("down", "i32 1 i32"), ("input gradient", "i32 i32 1")):
        types = f"{short} {short} {short} *i32 i32 i32 {strides}"
        yield side, gemm._rows_kernel, types, constants | padded, options
    constants, options = sizes(backend.weight_tiles(dtype))
    for gather_a in (True, False):
        types = f"{short} {short} *i32 {short} *i32 i32 i32"
        yield f"weights, {gather_a}", gemm._weights_kernel, types, constants | {"GATHER_A": gather_a}, options
    yield "sum of rows", combine._sum_rows_kernel, f"{short} *i32 *i32 {short} i32", {"WIDTH": 1024}, {}
    parts = {"E": EXPERTS, "PARTS": 16, "ROWS": 64}
    yield "gate gradient", combine._gate_gradient_kernel, "*fp32 *i32 *i32 *fp32 i32", parts, {}
    tiles = {"E": EXPERTS, "E_PAD": EXPERTS, "TOKENS": routes._TILE_ENTRIES // EXPERTS}
    yield "count", routes._count_kernel, "*u8 *i32 i32", tiles, {}
    yield "fill", routes._fill_kernel, "*u8 *i32 *i32 *i32 *i32 *i32 i32 i32", tiles, {}


def source(kernel: Any, types: str, constants: dict[str, Any]) -> ASTSource:
    """What Triton compiles for arguments that 16 divides, as it does at a launch with sizes that it divides."""
    left = iter(types.split())
    signature = {}
    fixed = {}
    attributes = {}
    for place, parameter in enumerate(kernel.params):
        value = constants[parameter.name] if parameter.is_constexpr else next(left)
        if parameter.is_constexpr or value == "1":
            signature[parameter.name] = "constexpr"
            fixed[place,] = 1 if value == "1" else value
            continue
        signature[parameter.name] = value
        if not parameter.do_not_specialize:
            attributes[place,] = [["tt.divisibility", 16]]
    assert next(left, None) is None
    return ASTSource(kernel, signature, fixed, attributes)


def main() -> None:
    found: dict[str, dict[str, int]] = {}
    for capability in sys.argv[1:]:
        target = GPUTarget("cuda", int(capability), 32)
        for dtype in _PRECISION:
            for name, kernel, types, constants, options in kernels(dtype):
                made = triton.compile(source(kernel, types, constants), target=target, options=options)
                found.setdefault(capability, {})[f"{name}, {dtype}"] = made.metadata.shared
    print(json.dumps(found))


if __name__ == "__main__":
    main()
