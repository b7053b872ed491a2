"""The clients of the table: scripts that run in separate environments, without this project."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.served.answers import PROMPTS, TOKENS, Answer
from tests.served.environments import python_of, variables


@dataclass(frozen=True)
class Said:
    """The result of a client for one model.

    Attributes:
        answers: answers to the prompts; empty after an error.
        error: the error, if any.
        apart: number of requests whose answer in a batch differs from the answer alone.
        versions: versions of the client's packages.
    """

    answers: list[Answer] = field(default_factory=list)
    error: str = ""
    apart: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)


def ask_client(
    client: str,
    models: Mapping[str, Path],
    folder: Path,
    timeout_s: float,
    environment: Mapping[str, str] | None = None,
    **job: Any,
) -> dict[str, Said]:
    """Runs the client's script for all models in turn.

    If the script exits or times out early, that is the error of the remaining models.

    Args:
        client: ``vllm``, ``mlx`` or ``llama``.
        models: the folder or file of each model, by name.
        folder: working directory for inputs and outputs.
        timeout_s: timeout for all models together.
        environment: additional environment variables.
        job: further inputs of the script.
    """
    folder.mkdir(parents=True, exist_ok=True)
    inputs = folder / "job.json"
    paths = {name: str(path) for name, path in models.items()}
    inputs.write_text(json.dumps({"models": paths, "prompts": PROMPTS, "tokens": TOKENS, **job}))
    command = [python_of(client), Path(__file__).with_name(f"{client}_client.py"), inputs]
    with (folder / "answers.txt").open("w") as answers, (folder / "errors.txt").open("w") as errors:
        process = subprocess.Popen(
            command, cwd=folder, env=variables(folder) | dict(environment or {}), stdout=answers, stderr=errors,
            start_new_session=True,
        )  # fmt: skip
    try:
        ending = f"the client exited with status {process.wait(timeout_s)}"
    except subprocess.TimeoutExpired:
        ending = f"no answer within {timeout_s:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and its child processes
        process.wait()
    said = {name: Said(error=ending) for name in models}
    for line in (folder / "answers.txt").read_text().splitlines():
        if line.startswith('{"name"'):
            row = json.loads(line)
            given = [Answer(**answer) for answer in row.get("answers", [])]
            said[row["name"]] = Said(given, row.get("error", ""), row.get("apart", 0), row["versions"])
    return said
