"""Benchmark 18: generation, compared with the export of the same model under transformers.

Greedy, with a key-value cache on both sides, in fp32; top-p routing. Weights are random; p is set in each layer so that
a token gets two experts on average. Both continue the same prompts in the same process, in turn, and sample the same
tokens, which is checked. Ours is what `python -m dynmoe.generate` runs, with the experts of every token; the other is
`generate` of the model that `from_pretrained` returns. Time is that of the process on one CPU thread.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.exports import export_random, write_corpus
from bench.report import Rows, verdict_at_least
from dynmoe.generate import continue_tokens
from dynmoe.model.sampling import Sampling
from dynmoe.trained import TrainedModel, open_trained

# Hidden size, heads, layers, width of the 16 experts.
_MODELS = {"quickstart": (128, 4, 4, 128), "larger": (512, 8, 8, 1024)}
_MEAN_K = 2.0
_VOCAB = 4096
_PROMPT = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", default=list(_MODELS), choices=list(_MODELS))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="texts at once")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens of each text")
    parser.add_argument("--rounds", type=int, default=7)


def run(given: argparse.Namespace) -> Rows:
    torch.set_num_threads(1)
    rows: Rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = write_corpus(folder, _VOCAB)
        for model in given.models:
            ours, theirs = _open(corpus, folder / model, model)
            rows += [_row(model, ours, theirs, batch, given) for batch in given.batches]
    return rows


def _open(corpus: Path, run: Path, name: str) -> tuple[TrainedModel, Any]:
    """The model of a new run, and its export in transformers."""
    from transformers import AutoModelForCausalLM

    hidden, heads, layers, width = _MODELS[name]
    fields = [
        f"model.hidden={hidden}", f"model.heads={heads}", f"model.kv_heads={heads // 2}", f"model.layers={layers}",
        "model.moe.experts=16", f"model.moe.expert_hidden={width}", "model.router.kind=top_p",
        "data.sequence_length=256",
    ]  # fmt: skip
    out = export_random(corpus, run, _VOCAB, fields, _MEAN_K)
    theirs = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=torch.float32)
    return open_trained(run, torch.device("cpu")), theirs.eval()


def _row(name: str, ours: TrainedModel, theirs: Any, batch: int, given: argparse.Namespace) -> dict[str, object]:
    generator = random.Random(0)
    prompts = [[generator.randrange(3, _VOCAB) for _ in range(_PROMPT)] for _ in range(batch)]
    tokens_BS = torch.tensor(prompts)
    length = {"max_new_tokens": given.tokens, "min_new_tokens": given.tokens, "do_sample": False}

    def with_transformers() -> list[list[int]]:
        made = theirs.generate(tokens_BS, attention_mask=torch.ones_like(tokens_BS), **length)
        return made[:, _PROMPT:].tolist()

    def with_ours() -> list[list[int | None]]:
        steps = continue_tokens(ours, prompts, given.tokens, Sampling(temperature=0))
        return [list(text) for text in zip(*(step.tokens for step in steps), strict=True)]

    assert with_ours() == with_transformers()
    methods: dict[str, Callable[[], object]] = {"ours": with_ours, "transformers": with_transformers}
    seconds: dict[str, list[float]] = {method: [] for method in methods}
    for _ in range(given.rounds):
        for method in generator.sample(list(methods), len(methods)):
            start = time.process_time()
            methods[method]()
            seconds[method].append(time.process_time() - start)
    ratios = [theirs / ours for ours, theirs in zip(seconds["ours"], seconds["transformers"], strict=True)]
    return {
        "model": name, "texts": batch, "new_tokens": given.tokens, "prompt": _PROMPT, "threads": 1,
        "tokens/s / transformers'": statistics.median(ratios), "least": min(ratios), "most": max(ratios),
    }  # fmt: skip


def verdicts(rows: Rows) -> list[str]:
    ratio = "tokens/s / transformers'"
    return [verdict_at_least(f"{ratio}, {row['model']}, {row['texts']} text(s)", row[ratio], 1.5) for row in rows]
