"""Benchmark 19: data_prep against the preparation of Megatron-LM's own tool, from JSON lines to files.

`python -m data_prep TEXT.jsonl --tokenizer MODEL --workers 2 --out DIR`, and the module `bench.megatron_preparation`
with the arguments TEXT.jsonl MODEL PREFIX 2, timed from start to end. Ours also drops copies, hashes texts and files,
and can be resumed. Memory is the largest sum over all processes of a command. A source that is too small is repeated,
and then has fewer new words than real text of that size, which helps our cache of words. The figures below are of the
source files of Linux 6.12 and of installed Python packages, in random order and without repetition, once for each
size.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from bench.data_prep import texts_of
from bench.report import verdict, verdict_at_least
from data_prep.recipe import Recipe
from data_prep.sources import STDLIB, list_units
from data_prep.vocabulary import train_tokenizer
from dynmoe.data.indexed import check_indexed
from dynmoe.errors import UserError

_TARGET = 1.5
_FLAT = 1.1
_POLL_S = 0.1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--source", default=STDLIB, help="text source, as for data_prep; repeated as often as needed")
    parser.add_argument("--megabytes", type=int, nargs="+", default=[250, 1000], help="amounts of text")
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)


def run(given: argparse.Namespace) -> list[dict[str, Any]]:
    texts = texts_of(given.source, max(given.megabytes))
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = folder / "tokenizer.model"
        sample = folder / "sample.jsonl"
        sample.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        recipe = Recipe([str(sample)], vocab_size=given.vocab_size)
        model.write_bytes(train_tokenizer(recipe, list_units([str(sample)])))
        for megabytes in given.megabytes:
            rows.append(_compare(given, texts, model, megabytes, folder))
    return rows


def _compare(given: argparse.Namespace, texts: list[str], model: Path, megabytes: int, folder: Path) -> dict[str, Any]:
    path = folder / "text.jsonl"
    size = _write(path, texts, megabytes * 1_000_000)
    seconds: dict[str, list[float]] = {"ours": [], "megatron": []}
    memory = dict.fromkeys(seconds, 0)
    for repeat in range(given.repeats):
        with tempfile.TemporaryDirectory(dir=folder) as made:
            commands = _commands(path, model, Path(made), given.workers)
            for name in sorted(commands, reverse=bool(repeat % 2)):
                took, peak = _timed(commands[name])
                seconds[name].append(took)
                memory[name] = max(memory[name], peak)
            _check_tokens(Path(made), given.vocab_size)
    return {
        "megabytes": round(size / 1e6),
        "workers": given.workers,
        "vocab_size": given.vocab_size,
        **{f"{name}_mb_per_s": size / 1e6 / statistics.median(own) for name, own in seconds.items()},
        **{f"{name}_peak_bytes": own for name, own in memory.items()},
        "times_megatron": statistics.median(theirs / ours for ours, theirs in zip(*seconds.values(), strict=True)),
    }


def _commands(text: Path, model: Path, made: Path, workers: int) -> dict[str, list[str]]:
    return {
        "ours": [
            sys.executable, "-m", "data_prep", str(text), "--tokenizer", str(model), "--workers", str(workers),
            "--out", str(made / "ours"),
        ],
        "megatron": [
            sys.executable, "-m", "bench.megatron_preparation", str(text), str(model), str(made / "theirs"),
            str(workers),
        ],
    }  # fmt: skip


def _write(path: Path, texts: list[str], size: int) -> int:
    """Writes at least ``size`` bytes of text as JSON lines, no two alike; returns the bytes of text."""
    written = 0
    with path.open("w") as stream:
        for number, text in enumerate(itertools.cycle(texts)):
            own = f"{number}\n{text}"
            stream.write(json.dumps({"text": own}) + "\n")
            written += len(own.encode())
            if written >= size:
                return written
    raise AssertionError


def _timed(command: list[str]) -> tuple[float, int]:
    """Seconds of a command, and the largest memory of all its processes together."""
    with tempfile.TemporaryFile("w+") as errors:  # a pipe that nobody reads would stop the command once it is full
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        peak = 0
        while process.poll() is None:
            peak = max(peak, sum(_resident(psutil.Process(process.pid))))
            time.sleep(_POLL_S)
        seconds = time.perf_counter() - started
        if process.returncode:
            errors.seek(0)
            said = errors.read().strip() or f"ended with status {process.returncode}"
            raise UserError(f"{' '.join(command)}: {said.splitlines()[-1]}")
    return seconds, peak


def _resident(process: psutil.Process) -> Iterator[int]:
    with contextlib.suppress(psutil.NoSuchProcess):
        for own in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                yield own.memory_info().rss


def _check_tokens(made: Path, vocab_size: int) -> None:
    """Both have the same number of each token; documents are in another order, as ours are split."""
    ours = sum(check_indexed(made / "ours" / split).counts(vocab_size) for split in ("train", "validation"))
    theirs = check_indexed(made / "theirs").counts(vocab_size)
    assert np.array_equal(ours, theirs), "the two encode differently"


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """Requires one and a half times the speed, and no more memory for more text."""
    lines = [
        verdict_at_least(f"{row['megabytes']} MB: times Megatron's speed", row["times_megatron"], _TARGET)
        for row in rows
    ]
    smallest, largest = (rows[place]["ours_peak_bytes"] for place in (0, -1))
    return [*lines, verdict("memory for the most text over that for the least", largest / smallest, _FLAT)]
