"""``make test-stacks``: the tests of engines, operators, layers, data and exports over the versions that people have.

Each combination is installed into an environment of its own, below ``.venv-stacks``; the table goes to the terminal and
into ``docs/stacks.md``. It takes about a quarter of an hour for each.
"""

from __future__ import annotations

import argparse
import datetime
import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path
from xml.etree import ElementTree

from dynmoe.errors import UserError
from harness.processes import CPU, ROOT
from tests.pages import rows, write

# The folders of tests that meet what differs between versions.
_TESTED = ["engines", "ops", "moe", "routing", "data", "hf"]
_MARKS = "not gpu and not slow and not cluster and not faults and not served"
_PAGE, _FOLDER = ROOT / "docs" / "stacks.md", ROOT / ".venv-stacks"


@dataclass(frozen=True)
class Stack:
    """Versions that are tested together, of which the first is Python's."""

    python: str
    megatron: str
    torch: str
    transformers: str = "5.24.0"
    deepspeed: str = "0.19.8"
    numpy: str = "2.5.5"

    @property
    def name(self) -> str:
        return f"{self.python}-{self.megatron}"


# The default one, then each minor version of Megatron-Core, and of torch and transformers as many as that gives.
STACKS = [
    Stack("3.11", "0.16.1", "2.13.0", numpy="2.4.6"),  # the last NumPy for Python 3.11
    # torch 2.11 brings Triton 3.6, whose interpreter does not run with NumPy 2.4.
    Stack("3.12", "0.17.1", "2.11.0", transformers="5.22.2", numpy="2.3.5"),
    Stack("3.12", "0.18.2", "2.12.1", transformers="5.23.0"),
    Stack("3.12", "0.19.2", "2.14.1"),
    Stack("3.13", "0.19.2", "2.14.1"),
]


@dataclass(frozen=True)
class Outcome:
    """What pytest counted, or why it did not come to that."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    reasons: tuple[str, ...] = ()
    missing: str = ""


def interpreter(version: str) -> Path:
    """The command of a Python version: on the path, or one of pyenv's.

    Raises:
        UserError: there is none.
    """
    on_the_path = shutil.which(f"python{version}")
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    found = [*([Path(on_the_path)] if on_the_path else []), *sorted(pyenv.glob(f"versions/{version}.*/bin/python"))]
    for path in found:
        if subprocess.run([path, "--version"], check=False, capture_output=True).returncode == 0:  # pyenv's may not
            return path
    raise UserError(f"python{version} is not there")


def install(stack: Stack) -> Path:
    """The interpreter of an environment that has the stack, made where it is not there yet.

    Raises:
        UserError: no such Python, or pip could not.
    """
    folder = _FOLDER / stack.name
    own, installed = folder / "bin" / "python", folder / ".installed"
    if not installed.exists() or installed.read_text() != str(stack):
        subprocess.run([interpreter(stack.python), "-m", "venv", "--clear", folder], check=True)
        torch = f"torch=={stack.torch}"
        others = [f"megatron-core=={stack.megatron}", f"deepspeed=={stack.deepspeed}"]
        others += [f"transformers=={stack.transformers}", f"numpy=={stack.numpy}", "--editable", f"{ROOT}[dev]"]
        for packages in [torch], [torch, *others]:  # first alone, so that a CPU build is taken where there is one
            done = subprocess.run([own, "-m", "pip", "install", "--quiet", *packages], check=False)
            if done.returncode:
                raise UserError(f"pip could not install {' '.join(packages)}")
        installed.write_text(str(stack))
    return own


def run_tests(stack: Stack) -> Outcome:
    """The tests in the stack's environment."""
    try:
        python = install(stack)
    except UserError as error:
        return Outcome(missing=str(error))
    report = _FOLDER / f"{stack.name}.xml"
    report.unlink(missing_ok=True)
    command = [python, "-m", "pytest", "-m", _MARKS, "--numprocesses", "2", "--dist", "loadfile", "--junitxml", report]
    folders = [ROOT / "tests" / folder for folder in _TESTED]
    subprocess.run([*command, *folders], cwd=ROOT, check=False, env=os.environ | CPU)
    if not report.exists():
        return Outcome(missing="pytest ended without a report")
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    skipped = [skip for case in cases if (skip := case.find("skipped")) is not None]
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    reasons = Counter(skip.get("message", "") for skip in skipped)
    notes = tuple(f"{reason} ({count})" for reason, count in reasons.items())
    return Outcome(len(cases) - len(skipped) - len(failed), len(failed), len(skipped), notes)


def table(outcomes: dict[Stack, Outcome]) -> str:
    """A row for each stack, and below it the reasons of what was skipped."""
    lines, notes = (
        [["Python", "Megatron-Core", "torch", "transformers", "DeepSpeed", "NumPy", "passed", "failed", "skipped"]],
        [],
    )
    for stack, outcome in outcomes.items():
        counts = [str(count) for count in (outcome.passed, outcome.failed, outcome.skipped)]
        versions = [getattr(stack, field.name) for field in fields(stack)]
        lines.append([*versions, *([outcome.missing] * 3 if outcome.missing else counts)])
        notes += [f"- Python {stack.python}, Megatron-Core {stack.megatron}: {reason}\n" for reason in outcome.reasons]
    below = f"\nSkipped:\n\n{''.join(notes)}" if notes else ""
    return f"{rows(lines)}\nRun on {datetime.date.today().isoformat()}.\n{below}"


def main(arguments: list[str]) -> int:
    """The exit status: 0 where nothing failed and nothing was missing."""
    parser = argparse.ArgumentParser(prog="python -m tests.stacks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="these stacks alone; the page stays as it is")
    names = parser.parse_args(arguments).names
    if unknown := sorted(set(names) - {stack.name for stack in STACKS}):
        parser.error(f"{unknown[0]}: is none of {', '.join(stack.name for stack in STACKS)}")
    outcomes = {stack: run_tests(stack) for stack in STACKS if stack.name in names or not names}
    text = table(outcomes)
    print(text)
    if not names:
        write(_PAGE, "make test-stacks", text)
    return int(any(outcome.failed or outcome.missing for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
