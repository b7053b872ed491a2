"""Reads the machine code (SASS) of a GPU kernel: registers, spilled bytes, and the instructions of its inner loop."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

# The first word of a matrix instruction: Hopper's reads shared memory, Blackwell's also writes its own memory, the
# others work on registers.
HOPPER_MATRIX = ("HGMMA", "QGMMA")
BLACKWELL_MATRIX = ("UTCHMMA", "UTCQMMA")
MATRIX = (*HOPPER_MATRIX, *BLACKWELL_MATRIX, "HMMA", "QMMA")
BULK_COPY = ("UTMALDG", "UBLKCP")
_FLOAT = ("FADD", "FMUL", "FFMA", "FMNMX", "FSEL", "FSETP", "FSET", "FFMA2", "F2FP", "HADD2", "HFMA2", "HMUL2")
# Shared memory, registers of other lanes, and what waits for either.
_SHARED = ("LDS", "LDSM", "STS", "STSM", "SHFL", "LDTM", "STTM", "REDUX")
_WAITS = (
    "BAR", "DEPBAR", "LDGDEPBAR", "SYNCS", "WARPGROUP", "WARPSYNC", "FENCE", "MEMBAR", "UTCBAR", "ARRIVES",
    "NANOSLEEP", "NOP", "CCTL", "ERRBAR", "UTMACCTL", "UTMACMDFLUSH", "ELECT",
)  # fmt: skip
_BRANCHES = ("BRA", "BRX", "BSSY", "BSYNC", "EXIT", "CALL", "RET", "BREAK", "YIELD", "BRXU")


@dataclass(frozen=True)
class Instruction:
    """``opcode`` with its modifiers, as in HGMMA.64x256x16.F32.BF16; ``target``: the label to which it may jump;
    ``conditional``: a predicate decides whether it runs."""

    opcode: str
    target: str | None = None
    conditional: bool = False

    @property
    def word(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def group(self) -> str:
        """What it does: a matrix product, a copy of so many bits, arithmetic of some kind, or waiting."""
        if self.word in MATRIX:
            return "matrix"
        if self.word in BULK_COPY:
            return "bulk copy"
        if self.word in ("LDGSTS", "LDG", "STG"):
            kind = {"LDGSTS": "copy", "LDG": "load", "STG": "store"}[self.word]
            return f"{kind} {self.bits}"
        if self.word in ("LDL", "STL"):
            return "spill"
        groups = {"float": _FLOAT, "MUFU": ("MUFU",), "shared": _SHARED, "wait": _WAITS, "branch": _BRANCHES}
        return next((name for name, words in groups.items() if self.word in words), "integer")

    @property
    def bits(self) -> int:
        """Bits that a thread copies."""
        width = re.search(r"\.(256|128|64|U16|S16|U8|S8)\b", self.opcode)
        return int(width[1].strip("US")) if width else 32


@dataclass(frozen=True)
class MachineCode:
    """A kernel as the card runs it: instructions in order, and the index of the first one after each label."""

    registers: int
    spilled_bytes: int
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]

    def successors(self, place: int) -> list[int]:
        """Instructions that may run after this one."""
        instruction = self.instructions[place]
        ends = instruction.word in ("EXIT", "RET", "BRA", "BRX") and not instruction.conditional
        target = self.labels.get(instruction.target or "")
        following = [] if ends or place + 1 == len(self.instructions) else [place + 1]
        return following if target is None else [*following, target]

    def loops(self) -> list[set[int]]:
        """The instructions of each loop.

        Blocks do not lie in the order in which they run: waits that seldom wait stand at the end and jump back. So a
        loop is a jump to an instruction on the way to the jump, with all that lies between in the order of running.
        """
        before: dict[int, list[int]] = {}
        ends: dict[int, list[int]] = {}  # jumps back, by the first instruction of the loop
        open_path: set[int] = set()
        seen = {0}
        stack = [(0, iter(self.successors(0)))]
        open_path.add(0)
        while stack:
            place, left = stack[-1]
            following = next(left, None)
            if following is None:
                open_path.discard(stack.pop()[0])
                continue
            before.setdefault(following, []).append(place)
            if following in open_path:
                ends.setdefault(following, []).append(place)
            if following not in seen:
                seen.add(following)
                open_path.add(following)
                stack.append((following, iter(self.successors(following))))
        return [_body(start, jumps, before) for start, jumps in ends.items()]

    def inner_loop(self) -> Counter[str]:
        """Counts the opcodes of the loop with the most matrix instructions among those that hold no other such loop;
        empty if no loop has one."""
        found = [loop for loop in self.loops() if self._matrices(loop)]
        innermost = [loop for loop in found if not any(other < loop for other in found)]
        busiest = max(innermost, key=self._matrices, default=set())
        return Counter(self.instructions[place].opcode for place in busiest)

    def _matrices(self, places: set[int]) -> int:
        return sum(self.instructions[place].word in MATRIX for place in places)


def _body(start: int, jumps: list[int], before: dict[int, list[int]]) -> set[int]:
    """What leads to one of the jumps without passing the start."""
    body = {start}
    left = list(jumps)
    while left:
        place = left.pop()
        if place not in body:
            body.add(place)
            left += before[place]
    return body


def groups(opcodes: Counter[str]) -> Counter[str]:
    """Adds up opcodes by what they do."""
    found: Counter[str] = Counter()
    for opcode, times in opcodes.items():
        found[Instruction(opcode).group] += times
    return found


def matrix_opcodes(opcodes: Counter[str]) -> Counter[str]:
    return Counter({code: times for code, times in opcodes.items() if Instruction(code).word in MATRIX})


def read(cubin: bytes) -> MachineCode:
    """Reads a compiled kernel with the tools that come with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        used = _tool("cuobjdump", "-res-usage", file.name)
        text = _tool("nvdisasm", "-c", file.name)
    registers, stack, local = (_number(name, used) for name in ("REG", "STACK", "LOCAL"))
    # Triton's kernels have no arrays of their own: what lies on the stack was spilled.
    return MachineCode(registers, stack + local, *parse(text))


def parse(text: str) -> tuple[tuple[Instruction, ...], dict[str, int]]:
    """Instructions and labels of what nvdisasm prints."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)(.*);", line):
            condition, opcode, operands = found.groups()
            target = re.search(r"\((\.L_\w+)\)", operands) if opcode.startswith("BR") else None
            # BRA may also name a predicate as an operand.
            conditional = condition is not None or bool(re.search(r"\bU?P\d", operands) and target)
            instructions.append(Instruction(opcode, target[1] if target else None, conditional))
    return tuple(instructions), labels


def _number(name: str, text: str) -> int:
    found = re.search(rf"\b{name}:(\d+)", text)
    assert found, text
    return int(found[1])


def _tool(name: str, *arguments: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout
