"""F28: the reason why a run cannot start is the last message on the screen."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.train.cases import launch


def launch_once(corpus: Path, folder: Path, *fields: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return launch(corpus, folder, *fields, MAX_RESTARTS="0", STARTS_WITHOUT_PROGRESS="1", **environment)


@pytest.mark.slow
def test_f28_import_failure_at_start(corpus_dir, tmp_path):
    (tmp_path / "deepspeed.py").write_text('raise ImportError("libcudart.so.13: no such file")\n')
    done = launch_once(corpus_dir, tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 3, done.stdout
    lines = done.stdout.splitlines()
    assert lines[-1] == "ImportError: libcudart.so.13: no such file"
    first = next(number for number, line in enumerate(lines) if line.startswith("first failure: rank "))
    assert lines[first + 1] == "Traceback (most recent call last):"


@pytest.mark.slow
def test_f28_out_of_memory_at_start(corpus_dir, tmp_path):
    done = launch_once(corpus_dir, tmp_path, "model.moe.expert_hidden=2000000000")
    assert done.returncode == 3, done.stdout
    assert "can't allocate memory: you tried to allocate 512000000000 bytes" in done.stdout.splitlines()[-1]


@pytest.fixture
def busy_port() -> Iterator[str]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield str(listener.getsockname()[1])


def test_f28_master_port_in_use(corpus_dir, tmp_path, busy_port):
    done = launch_once(corpus_dir, tmp_path, MASTER_PORT=busy_port)
    assert done.returncode == 2, done.stdout
    assert done.stdout.splitlines()[-1] == (
        f"error: MASTER_PORT={busy_port}: Address already in use on this host; use another port, the same on every node"
    )
