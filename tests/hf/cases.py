"""Tiny runs for export, and the outputs of their models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynmoe.config import Config, DataConfig, load_config
from dynmoe.data.batches import Batch, PretrainingData
from dynmoe.data.corpus import Corpus
from dynmoe.data.tokenizer_files import open_tokenizer
from dynmoe.model import Decoder
from dynmoe.trained import begin_run
from harness.processes import WarmTraining
from tests.moe.cases import BASELINES, ROUTERS
from tests.train.cases import read_rows

TOP_K = ["model.router.kind=top_k", "model.router.k=2"]
LLAMA3 = ["model.rope_scaling.kind=llama3", "model.rope_scaling.factor=4", "model.rope_scaling.original_length=8"]
YARN = [
    "model.rope_scaling.kind=yarn", "model.rope_scaling.factor=4", "model.rope_scaling.original_length=8",
    "model.rope_scaling.truncate=false",
]  # fmt: skip
# Our configurations by the architecture of transformers that they are exported to.
STANDARD = {
    "llama": ["model.moe.experts=0", "model.head_dim=12"],
    "llama, scaled and biased": ["model.moe.experts=0", *LLAMA3, "model.attention_bias=all"],
    "mixtral": [*TOP_K, "model.router.renormalize=true"],
    "mixtral, window": [*TOP_K, "model.router.renormalize=true", "model.window=4"],
    "olmoe": [*TOP_K, "model.qk_norm=projection"],
    "qwen2_moe": TOP_K,
    "qwen2_moe, shared and dense": [
        *TOP_K, "model.moe.shared_hidden=16", "model.moe.moe_layer_freq=2", "model.router.renormalize=true",
    ],
    "qwen2_moe, gated after a dense layer": [
        *TOP_K, "model.moe.shared_hidden=16", "model.moe.shared_gate=true", "model.moe.first_k_dense_replace=1",
    ],
    "qwen3_moe": [*TOP_K, "model.qk_norm=head", "model.head_dim=12", "model.tie_embeddings=true"],
    "qwen3_moe, long": [*TOP_K, "model.qk_norm=head", "model.window=4", *YARN, "model.attention_bias=all"],
    "qwen3_moe, dense": [*TOP_K, "model.qk_norm=head", "model.moe.moe_layer_freq=2"],
}  # fmt: skip
OWN = {
    "long": [
        "model.router.kind=top_p", "model.window=4", "model.full_attention_layers=[1]", *YARN,
        "model.attention_bias=qkv",
    ],
    **{name: fields for name, fields in (ROUTERS | BASELINES).items() if name != "top_k"},
    "top_k, biased": TOP_K,
    "top_p released": ["model.router.kind=top_p", "model.router.variant=released", "model.router.max_experts=3"],
    "top_k of deepseek_v3, biased": [
        *BASELINES["top_k grouped"], "model.moe.shared_hidden=16", "model.moe.shared_gate=true",
        "model.moe.first_k_dense_replace=1", "model.router.balance_scope=sequence",
    ],
    "everything": [
        "model.router.kind=top_p", "model.qk_norm=projection", "model.moe.shared_hidden=16",
        "model.moe.moe_layer_freq=2", "model.tie_embeddings=true", "model.router.renormalize=true",
    ],
}  # fmt: skip
BATCH = 2
LENGTH = 13


@dataclass(frozen=True)
class Begun:
    """A run without any steps, and its model."""

    path: Path
    config: Config
    decoder: Decoder


def begin(corpus: Path, path: Path, overrides: Sequence[str], rows: int = 448) -> Begun:
    """Creates a run of a tiny model with router state; selection biases are set if the name contains "biased"."""
    config = load_config(None, [
        f"data.dirs=[{corpus}]", "data.sequence_length=64", "model.hidden=16", "model.heads=2", "model.kv_heads=1",
        "model.layers=3", "model.ffn_hidden=32", "model.moe.experts=4", "model.moe.expert_hidden=24",
        "model.init_std=0.3", *overrides, f"run.dir={path.parent}", f"run.name={path.name}",
    ])  # fmt: skip
    decoder = Decoder(config.model, rows, seed=0).eval()
    decoder.context.aim(config.budget.experts_per_token)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in decoder.named_parameters():
        if name.endswith(("norm.weight", "attention.b_qkv", "attention.b_out")):
            parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    for layer in decoder.moe_layers:
        for name, buffer in layer.router.named_buffers():
            if name in ("cutoff", "cutoffs_E"):
                buffer.fill_(0.5).add_(0.02 * torch.randn(buffer.shape, generator=generator))
            if name == "offset_E" or (name in ("bias_E", "bias_X") and "biased" in path.name):
                buffer.add_(0.02 * torch.randn(buffer.shape, generator=generator))
            if name in layer.router.by_budget:
                buffer.add_(0.02 * torch.arange(float(len(buffer))).view(-1, *[1] * (buffer.dim() - 1)))
    begin_run(config, decoder, open_tokenizer(corpus).files, path)
    return Begun(path, config, decoder)


def some_tokens(vocab_size: int = 400) -> Tensor:
    return torch.randint(3, vocab_size, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def run_decoder(decoder: Decoder, tokens_BS: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Returns the logits, and the routing map of each MoE layer, [B, S, E]."""
    maps: list[Tensor] = []
    hooks = [
        layer.router.register_forward_hook(
            lambda module, inputs, plan: maps.append(plan.routing_map_TE.view(*tokens_BS.shape, -1))
        )
        for layer in decoder.moe_layers
    ]
    logits = decoder.eval()(tokens_BS)
    for hook in hooks:
        hook.remove()
    return logits, maps


def twenty_steps(corpus: Path) -> list[str]:
    """Fields of a run for :func:`train_run`."""
    return [
        f"data.dirs=[{corpus}]", "data.sequence_length=32", "train.global_batch=4", "train.micro_batch=2",
        "train.steps=20", "optimizer.lr=1e-2", "schedule.warmup_steps=0", "logging.interval=1", "eval.batches=2",
    ]  # fmt: skip


def train_run(run: Path, corpus: Path, tmp_path: Path, ranks: int) -> tuple[list[dict[str, Any]], Batch]:
    """Trains a run on sequences of 32 tokens of ``corpus``; its rows of metrics, and the first four sequences."""
    process = WarmTraining([str(run / "config.yaml")], ranks, 0, tmp_path / "output.txt", {}, None)
    assert process.wait() == 0, process.output()
    data = PretrainingData([Corpus.open(corpus)], DataConfig(sequence_length=32), 0, tmp_path / "index")
    data.prepare(0, 4)
    return read_rows(run / "metrics.jsonl"), data.train_batch(range(4))
