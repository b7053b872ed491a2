"""How tools end when their output breaks; ``tests/launch/test_starts.py`` tests the errors that launchers report."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from harness.processes import ROOT


def ended(work: str, closed: bool) -> tuple[int, str]:
    """Exit status and errors of a tool that does ``work``; ``closed``: nobody reads its output."""
    program = f"import os\nfrom dynmoe.cli import run_tool\nrun_tool(lambda: {work})"
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as tool:
        assert tool.stdout is not None
        assert tool.stderr is not None
        if closed:
            tool.stdout.close()
        errors = tool.stderr.read()
    return tool.returncode, errors


@pytest.mark.parametrize("length", [1, 10**6], ids=["at the end", "in the middle"])
def test_a_tool_whose_reader_has_ended_says_nothing(length):
    assert ended(f"print('x' * {length})", closed=True) == (128 + signal.SIGPIPE, "")


def test_another_broken_pipe_is_an_error():
    to_nobody = "(lambda ends: (os.close(ends[0]), os.write(ends[1], b'x')))(os.pipe())"
    status, errors = ended(to_nobody, closed=False)
    assert status == 1
    assert errors.splitlines()[-1] == "BrokenPipeError: [Errno 32] Broken pipe"
