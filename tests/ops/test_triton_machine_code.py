"""The machine code of our kernels, for cards that need not be here: what a GPU would have to show in time shows there.

What the kernels compute is tested in Triton's interpreter (test_triton.py).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest

from harness.machine_code import CARDS, SHAPES, Compiled, from_json
from harness.processes import ROOT
from harness.sass import MachineCode, groups, matrix_opcodes, parse

# The kernels with a product, and the most other instructions for one of the matrix instructions in their inner loop.
#
# Hopper and Blackwell: one instruction multiplies 64 x 256 x 16, on Blackwell 128 x 256 x 16, and occupies the matrix
# units for 128 cycles. In these, each of the four schedulers can issue 128 others for its two warps. What is left are
# indices of tokens, addresses from which to gather them, places in the ring of buffers, and waiting. The gradients of
# weights gather most: 35 on Hopper; on Blackwell, where one must also wait for the product, 38.
# Others: one instruction of a warp multiplies 16 x 8 x 16, and 32 or 64 of them share what a loop does once.
PRODUCTS = {"up", "activation_gradient", "rows", "weights"}
MOST_OTHERS = {80: 3, 90: 35, 100: 38, 120: 3}


def faults(compiled: Compiled) -> list[str]:
    """What is wrong with the machine code of a kernel, in words."""
    found = []
    card = CARDS[compiled.capability]
    if compiled.spilled_bytes:
        found.append(f"spills {compiled.spilled_bytes} bytes")
    if compiled.shared_bytes > card.shared_bytes:
        found.append(f"needs {compiled.shared_bytes} bytes of shared memory, {card.name} has {card.shared_bytes}")
    if compiled.blocks == 0:
        found.append("does not fit into a multiprocessor")
    if compiled.kernel in PRODUCTS and compiled.dtype == "bf16":
        found += _faults_of_loop(compiled)
    return [
        f"{compiled.kernel} of {', '.join(compiled.shapes)} for sm_{compiled.capability} {fault}" for fault in found
    ]


def _faults_of_loop(compiled: Compiled) -> list[str]:
    loop = Counter(compiled.loop)
    products = sum(times for code, times in matrix_opcodes(loop).items() if code.startswith(_matrix(compiled)))
    if not products:
        return [f"has no {_matrix(compiled)} in a loop"]
    found = []
    by_group = groups(loop)
    others = (by_group.total() - products) / products
    if others > MOST_OTHERS[compiled.capability]:
        found.append(f"has {others:.1f} other instructions for each {_matrix(compiled)}")
    if not by_group["copy 128"] and not by_group["bulk copy"]:
        found.append("copies nothing ahead")
    # Single words are indices of tokens, on their way to registers.
    found += [
        f"has {group} in the loop" for group in by_group if group.startswith(("copy", "load")) and group not in _WIDE
    ]
    return found


_WIDE = ("copy 128", "load 32")


def _matrix(compiled: Compiled) -> str:
    return CARDS[compiled.capability].matrix


def machine_code(module: str, *arguments: str) -> list[Compiled]:
    """Compiles in a process of its own: in this one, kernels are for the interpreter."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=ROOT, env=environment, check=False, capture_output=True,
        text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return from_json(done.stdout)


@pytest.fixture(scope="module")
def of_hopper() -> list[Compiled]:
    return machine_code("harness.machine_code", "90")


def _all_kernels_of_all_shapes(found: list[Compiled]) -> None:
    names = {compiled.kernel for compiled in found}
    assert names == PRODUCTS | {"count", "fill", "sum_rows", "gate_gradient"}
    for name in names:
        assert {shape for compiled in found if compiled.kernel == name for shape in compiled.shapes} == set(SHAPES)


def test_hopper_runs_every_kernel_without_spilling_and_feeds_its_matrix_units(of_hopper):
    _all_kernels_of_all_shapes(of_hopper)
    assert [fault for compiled in of_hopper for fault in faults(compiled)] == []


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("capability", [80, 100, 120])
def test_other_cards_run_every_kernel_without_spilling(capability, dtype):
    found = machine_code("harness.machine_code", str(capability), "--dtypes", dtype)
    _all_kernels_of_all_shapes(found)
    assert [fault for compiled in found for fault in faults(compiled)] == []


@pytest.mark.slow
def test_hopper_runs_every_kernel_in_full_precision_without_spilling():
    assert [
        fault
        for compiled in machine_code("harness.machine_code", "90", "--dtypes", "fp32")
        for fault in faults(compiled)
    ] == []


def test_a_bad_kernel_has_all_faults():
    (bad,) = machine_code("tests.ops.bad_kernel", "90")
    found = "; ".join(faults(replace(bad, kernel="rows", shapes=("a bad one",))))
    for fault in ("spills ", "other instructions for each HGMMA", "copies nothing ahead", "has load 16 in the loop"):
        assert fault in found, found


def test_each_limit_is_one(of_hopper):
    weights = next(compiled for compiled in of_hopper if compiled.kernel == "weights")
    changes = {
        "of shared memory, H100 has 232448": {"shared_bytes": 227 * 1024 + 1},
        "does not fit": {"blocks": 0},
        "spills 4 bytes": {"spilled_bytes": 4},
        "has no HGMMA in a loop": {"loop": {"HMMA.16816.F32.BF16": 8, "IMAD": 2}},
        "copies nothing ahead": {"loop": {"HGMMA.64x256x16.F32.BF16": 4, "LDS": 4}},
        "has copy 64 in the loop": {"loop": weights.loop | {"LDGSTS.E.64": 1}},
        "has 36.0 other": {"loop": {"HGMMA.64x256x16.F32.BF16": 4, "LDGSTS.E.BYPASS.128": 4, "IADD3": 4 * 35}},
    }
    for fault, change in changes.items():
        assert fault in "; ".join(faults(replace(weights, **change))), fault


def test_loops_are_found_where_blocks_do_not_lie_in_their_order():
    """A wait at the end of the code jumps back into the loop; it is a part of it, not a loop around it."""
    text = """
    /*0000*/  MOV R1, c[0x0][0x28] ;
.L_x_0:
    /*0010*/  IADD3 R2, R2, 0x1, RZ ;
.L_x_1:
    /*0020*/  SYNCS.PHASECHK.TRANS64.TRYWAIT P2, [UR8], R2 ;
    /*0030*/  @!P2 BRA `(.L_x_3) ;
.L_x_2:
    /*0040*/  HGMMA.64x256x16.F32.BF16 R24, gdesc[UR24], R24 ;
    /*0050*/  @!P1 BRA `(.L_x_1) ;
    /*0060*/  STG.E.128 desc[UR4][R2.64], R24 ;
    /*0070*/  HGMMA.64x256x16.F32.BF16 R24, gdesc[UR24], R24 ;
    /*0080*/  @P0 BRA `(.L_x_0) ;
    /*0090*/  EXIT ;
.L_x_3:
    /*00a0*/  SYNCS.PHASECHK.TRANS64.TRYWAIT P2, [UR8], R2 ;
    /*00b0*/  @!P2 BRA `(.L_x_3) ;
    /*00c0*/  BRA `(.L_x_2) ;
"""
    code = MachineCode(64, 0, *parse(text))
    assert len(code.loops()) == 3  # of the tiles, of the product, of the wait
    loop = code.inner_loop()
    assert loop["HGMMA.64x256x16.F32.BF16"] == 1
    assert loop["BRA"] == 4
    assert loop["STG.E.128"] == loop["IADD3"] == 0
    assert groups(loop)["wait"] == 2
