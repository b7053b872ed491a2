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

import torch
from torch import Tensor

from bench.report import Rows
from data_prep.build import build
from data_prep.recipe import Recipe
from dynmoe.config import load_config
from dynmoe.data.corpus import TOKENIZER
from dynmoe.errors import UserError
from dynmoe.hf.export import export
from dynmoe.model import Decoder
from dynmoe.moe.router import Router
from dynmoe.routers import TopP
from dynmoe.trained import begin_run

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
        _write_corpus(Path(folder))
        models = {name: str(_export(Path(folder), name, given)) for name in _ROUTERS}
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
    return [
        f"{name}: {rows[0][name]:.3f}, target at least {limit:g}: "
        + ("reached" if rows[0][name] >= limit else f"missed by {limit - rows[0][name]:.3f}")
        for name, limit in limits.items()
    ]


def _write_corpus(folder: Path) -> None:
    """Prepares a corpus for its tokenizer, which an export needs; requests are token ids."""
    (folder / "text").mkdir()
    for number in range(100):
        sentence = f"{number:b} in ones and zeros is {number}, and {number * 7} is seven of it.\n"
        (folder / "text" / f"{number}.txt").write_text(sentence * 4)
    build(Recipe([str(folder / "text")], vocab_size=300, validation_fraction=0.1), folder / "corpus", workers=1)


def _export(folder: Path, name: str, given: argparse.Namespace) -> Path:
    heads = given.hidden // 64
    config = load_config(None, [
        f"model.hidden={given.hidden}", f"model.heads={heads}", f"model.kv_heads={heads // 2}",
        f"model.layers={given.layers}", f"model.moe.experts={given.experts}", f"model.moe.expert_hidden={given.width}",
        f"data.dirs=[{folder / 'corpus'}]", "data.sequence_length=256", *_ROUTERS[name], f"run.dir={folder}",
        f"run.name={name}",
    ])  # fmt: skip
    decoder = Decoder(config.model, _VOCAB, seed=0).eval()
    if name == "top_p":
        _set_p(decoder)
    begin_run(config, decoder, {TOKENIZER: (folder / "corpus" / TOKENIZER).read_bytes()}, folder / name)
    export(folder / name, folder / f"{name}_out")
    return folder / f"{name}_out"


@torch.no_grad()
def _set_p(decoder: Decoder) -> None:
    """Spreads the scores of each router, and sets p so that these tokens get two experts on average."""

    def fit(router: Router, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(router.spec, TopP)
        router.get_parameter("weight_ED").normal_(0.0, 2.0 / inputs[0].shape[1] ** 0.5)
        router.spec.fit(router, router.spec.logits_TE(router, inputs[0]), _MEAN_K)

    hooks = [layer.router.register_forward_pre_hook(fit) for layer in decoder.moe_layers]
    decoder(torch.randint(3, _VOCAB, (16, 64), generator=torch.Generator().manual_seed(0)))
    for hook in hooks:
        hook.remove()
