"""A kernel that does what ours must not, compiled for a card: python -m tests.ops.bad_kernel 90

A thread holds more sums than it has registers, operands are read with 16 bits at a time when they are needed.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import torch
import triton
import triton.language as tl

from harness.machine_code import describe, pretended_card


@triton.jit
def _bad_kernel(a_ptr, b_ptr, out_ptr, stride, depth, SIZE: tl.constexpr, DEPTH: tl.constexpr):
    place = tl.arange(0, SIZE)
    column = tl.arange(0, SIZE // 2)
    k = tl.arange(0, DEPTH)
    total = tl.zeros((SIZE, SIZE // 2), dtype=tl.float32)
    for start in range(0, depth, DEPTH):
        a = tl.load(a_ptr + place[:, None] * stride + (start + k)[None, :] * 3)
        b = tl.load(b_ptr + (start + k)[:, None] * stride + column[None, :] * 3)
        total = tl.dot(a, b, total)
    tl.store(out_ptr + place[:, None] * SIZE + column[None, :], total)


def main() -> None:
    capability = int(sys.argv[1])
    with pretended_card(capability) as launched:
        operand, out = (torch.empty(1, dtype=torch.bfloat16, device="meta") for _ in range(2))
        _bad_kernel[(1,)](operand, operand, out, 4099, 4096, SIZE=256, DEPTH=16, num_warps=4, num_stages=1)
    ((kernel, compiled, constants),) = launched
    print(json.dumps([asdict(describe(kernel, compiled, capability, "bf16", constants))]))


if __name__ == "__main__":
    main()
