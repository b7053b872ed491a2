"""Benchmark 15: an exported top-p model in vLLM, compared with a Mixtral export of its shape, and with transformers.

Weights are random; p is set in each layer so that a token gets two experts on average, as in Mixtral. One process holds
both models in vLLM and the first in transformers, and answers the same requests with each in turn: 32 at once, on one
CPU thread. Needs vLLM in its own environment, which make test-served creates.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from pathlib import Path

from bench.exports import export_random, write_corpus
from bench.report import Rows, verdict_at_least
from dynmoe.errors import UserError

_CLIENT = Path(__file__).with_name("served_client.py")
_MEAN_K = 2.0
_VOCAB = 8192
_ROUTERS = {
    "top_p": ["model.router.kind=top_p"],
    "mixtral": ["model.router.kind=top_k", "model.router.k=2", "model.router.renormalize=true"],
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--python", type=Path, default=Path(".venv-served/vllm/bin/python"), help="Python with vLLM")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--width", type=int, default=512, help="width of an expert")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64, help="tokens per answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--eager", action="store_true", help="run vLLM without torch.compile")


def run(given: argparse.Namespace) -> Rows:
    if not given.python.exists():
        raise UserError(f"--python: {given.python} does not exist; run make test-served to create it")
    with tempfile.TemporaryDirectory() as folder:
        corpus = write_corpus(Path(folder), 300)
        models = {name: str(_export(corpus, name, given)) for name in _ROUTERS}
        task = {
            "models": models, "requests": given.requests, "tokens": given.tokens, "rounds": given.rounds,
            "eager": given.eager, "vocab": _VOCAB,
        }  # fmt: skip
        # -P: the client's folder contains files with the names of Python's own modules.
        settings = {"VLLM_CPU_OMP_THREADS_BIND": "0", "VLLM_CACHE_ROOT": folder, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [given.python, "-P", _CLIENT], input=json.dumps(task), text=True, capture_output=True, check=False,
            env=os.environ | settings,
        )  # fmt: skip
    if done.returncode:
        raise UserError(f"vLLM: {done.stderr.strip().splitlines()[-1]}; run {_CLIENT} for the whole output")
    seconds, experts = (json.loads(line) for line in done.stdout.splitlines()[-2:])
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return [
        {
            "experts per token": statistics.mean(experts),
            "top-p tokens/s / Mixtral's": median["mixtral"] / median["top_p"],
            "vLLM tokens/s / transformers'": median["transformers"] / median["top_p"],
            "rounds": given.rounds, "compiled": not given.eager,
        }
    ]  # fmt: skip


def verdicts(rows: Rows) -> list[str]:
    limits = {"top-p tokens/s / Mixtral's": 0.9, "vLLM tokens/s / transformers'": 2.0}
    return [verdict_at_least(name, rows[0][name], limit) for name, limit in limits.items()]


def _export(corpus: Path, name: str, given: argparse.Namespace) -> Path:
    heads = given.hidden // 64
    fields = [
        f"model.hidden={given.hidden}", f"model.heads={heads}", f"model.kv_heads={heads // 2}",
        f"model.layers={given.layers}", f"model.moe.experts={given.experts}", f"model.moe.expert_hidden={given.width}",
        "data.sequence_length=256", *_ROUTERS[name],
    ]  # fmt: skip
    return export_random(corpus, corpus.with_name(name), _VOCAB, fields, _MEAN_K if name == "top_p" else None)
