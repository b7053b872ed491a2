"""The clients of the table: each a script that an environment of its own runs, without this project."""

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
    """What a client says of one model.

    Attributes:
        answers: to the prompts; none where there is an error.
        error: why there are none.
        apart: requests that are answered otherwise among others than alone.
        versions: of the client's packages.
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
    """Has the client's script answer for the models in turn.

    Should it end, or be ended, before it has come to all of them, then that is the error of the others.

    Args:
        client: ``vllm``, ``mlx`` or ``llama``.
        models: what each is called, and the folder or file that the client reads.
        folder: for what it is told and leaves behind.
        timeout_s: for all models together.
        environment: variables to add.
        job: what the script wants to know beside models, prompts and tokens.
    """
    folder.mkdir(parents=True, exist_ok=True)
    told, paths = folder / "job.json", {name: str(path) for name, path in models.items()}
    told.write_text(json.dumps({"models": paths, "prompts": PROMPTS, "tokens": TOKENS, **job}))
    command = [python_of(client), Path(__file__).with_name(f"{client}_client.py"), told]
    with (folder / "answers.txt").open("w") as answers, (folder / "errors.txt").open("w") as errors:
        process = subprocess.Popen(
            command, cwd=folder, env=variables(folder) | dict(environment or {}), stdout=answers, stderr=errors,
            start_new_session=True,
        )  # fmt: skip
    try:
        ending = f"the client ended with status {process.wait(timeout_s)}"
    except subprocess.TimeoutExpired:
        ending = f"no answer within {timeout_s:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # itself and what it has started
        process.wait()
    said = {name: Said(error=ending) for name in models}
    for line in (folder / "answers.txt").read_text().splitlines():
        if line.startswith('{"name"'):
            row = json.loads(line)
            given = [Answer(**answer) for answer in row.get("answers", [])]
            said[row["name"]] = Said(given, row.get("error", ""), row.get("apart", 0), row["versions"])
    return said
