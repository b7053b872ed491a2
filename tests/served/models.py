"""The models of the table: each architecture of transformers and each router, trained briefly and exported."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from dynmoe.hf.command import main
from harness.processes import WarmTraining
from tests.hf.cases import TOP_K

# The smallest sizes that all servers support: vLLM's attention on a CPU requires heads of 32, two ranks halve sizes,
# and mlx-lm's Mixtral requires hidden / heads as head width. Each embedding row represents a piece, because a GGUF file
# omits further rows, and with them their share of the probability.
_SHAPE = [
    "data.sequence_length=64", "model.vocab_size=400", "model.layers=3", "model.hidden=128", "model.heads=4",
    "model.kv_heads=2", "model.ffn_hidden=192", "model.moe.experts=8", "model.moe.expert_hidden=64",
]  # fmt: skip
_TRAINING = [
    "train.steps=60", "train.global_batch=16", "train.micro_batch=16", "optimizer.lr=3e-3", "schedule.warmup_steps=6",
    "checkpoint.interval=60", "eval.interval=60", "eval.batches=1", "eval.sample_tokens=0", "logging.interval=20",
    "logging.wandb=disabled",
]  # fmt: skip
_TIMEOUT_S = 600.0  # for one training, which takes seconds
DENSE = "Qwen2-MoE, dense layers"
NORMALIZED = "Qwen2-MoE, shared expert, gates that sum to 1"
# Models that transformers has; the fields in addition to those above.
FIXED = {
    "Llama": ["model.moe.experts=0"],
    "Mixtral": [*TOP_K, "model.router.renormalize=true"],
    "OLMoE": [*TOP_K, "model.qk_norm=projection"],
    "Qwen3-MoE": [*TOP_K, "model.qk_norm=head", "model.head_dim=64", "model.tie_embeddings=true"],
    "Qwen2-MoE": TOP_K,
    "Qwen2-MoE, shared expert": [*TOP_K, "model.moe.shared_hidden=96"],
    DENSE: [*TOP_K, "model.moe.moe_layer_freq=2"],
    NORMALIZED: [*TOP_K, "model.moe.shared_hidden=96", "model.router.renormalize=true"],
}  # fmt: skip
# Models with our own code: every router, and every other architectural option with one of them.
DYNAMIC = {
    "top_p": ["model.router.kind=top_p"],
    "top_any, shared expert": ["model.router.kind=top_any", "model.router.variant=improved",
                               "model.moe.shared_hidden=96"],
    "sigmoid, normalized heads": ["model.router.kind=sigmoid", "model.qk_norm=head"],
    "null_experts, dense layers": ["model.router.kind=null_experts", "model.router.k=4", "model.router.num_null=8",
                                   "model.moe.moe_layer_freq=2"],
    "relu, tied embeddings": ["model.router.kind=relu", "budget.experts_per_token=2", "model.tie_embeddings=true"],
    "expert_threshold, normalized projections": [
        "model.router.kind=expert_threshold", "budget.experts_per_token=2", "model.qk_norm=projection",
    ],
}  # fmt: skip


@dataclass(frozen=True)
class Served:
    """A model of the table.

    Attributes:
        run: directory of the run.
        export: directory of the export.
    """

    run: Path
    export: Path


def make_models(corpus: Path, folder: Path) -> dict[str, Served]:
    """Trains and exports the models, one at a time."""
    made = {}
    for number, (name, fields) in enumerate((FIXED | DYNAMIC).items()):
        run = folder / "runs" / f"model_{number}"
        out = folder / f"export_{number}"
        train(corpus, run, fields)
        call_hf("export", run, out)
        made[name] = Served(run, out)
    return made


def train(corpus: Path, run: Path, fields: Sequence[str]) -> None:
    """Runs ``train.py`` on one rank, with a tiny model and ``fields``, in the directory ``run``."""
    run.parent.mkdir(parents=True, exist_ok=True)
    place = [f"data.dirs=[{corpus}]", f"run.dir={run.parent}", f"run.name={run.name}"]
    training = WarmTraining([*place, *_SHAPE, *_TRAINING, *fields], 1, 0, run.with_suffix(".txt"), {})
    assert training.wait(_TIMEOUT_S) == 0, training.output()[-2000:]


def call_hf(*words: str | Path) -> None:
    """Calls ``python -m dynmoe.hf`` in this process.

    Raises:
        UserError: the error that the command would print.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["dynmoe.hf", *map(str, words)])
        main()
