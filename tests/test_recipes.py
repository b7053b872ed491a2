"""The configurations of models of the field: trained at toy size, and started on all their ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from dynmoe.config import load_config
from dynmoe.engines import make_engine
from dynmoe.plan.layout import Layout
from dynmoe.plan.memory import memory_of_stage
from dynmoe.train.engine import take_step
from harness.processes import ROOT
from tests.engines.cases import GLOBAL_BATCH, LENGTH, VOCAB, keep_maps, micro_batches
from tests.plan.started import bytes_of_ranks

STEPS = 100
# Every structure of the model stays; only sizes become small. The biases settle within these steps.
TOY = [
    "model.layers=4", "model.hidden=64", "model.ffn_hidden=96", "model.heads=4", "model.kv_heads=4",
    f"model.vocab_size={VOCAB}", "model.init_std=0.1", "model.latent.kv_lora_rank=32",
    "model.latent.qk_nope_head_dim=16", "model.latent.qk_rope_head_dim=8", "model.latent.v_head_dim=16",
    "model.moe.experts=16", "model.moe.expert_hidden=32", f"data.sequence_length={LENGTH}",
    f"train.global_batch={GLOBAL_BATCH}", "train.micro_batch=4", "train.precision=fp32", "optimizer.lr=3e-3",
    "budget.rate=1.0",
]  # fmt: skip
# By file: fields that a toy with few layers, experts and ranks needs.
TOYS = {
    "deepseek_v3_one_node": ["model.moe.shared_hidden=64", "parallel.expert=2"],
    "deepseek_v3_64x8": [
        "model.moe.shared_hidden=32", "model.moe.first_k_dense_replace=1", "model.latent.q_lora_rank=32",
        "model.moe.experts=32", "parallel.expert=2", "parallel.tensor=2", "parallel.pipeline=2",
    ],
    "longcat_one_node": ["model.latent.q_lora_rank=32", "model.router.num_identity=8", "parallel.expert=2"],
    "longcat_64x8": [
        "model.latent.q_lora_rank=32", "model.router.num_identity=8", "parallel.expert=2", "parallel.tensor=2",
        "parallel.pipeline=2",
    ],
}  # fmt: skip


def path_of(name: str) -> Path:
    return ROOT / "configs" / f"{name}.yaml"


def train_toy(name: str) -> dict[str, Any]:
    """Losses, and the experts of each token in each MoE layer of this rank in the last step."""
    config = load_config(path_of(name), [*TOY, *TOYS[name]])
    engine = make_engine(config, VOCAB)
    losses = []
    for step in range(STEPS):
        if step == STEPS - 1:
            maps = keep_maps(engine.layers)
        batches = micro_batches(config, step, engine.data_rank, engine.data_size)
        losses.append(take_step(engine, batches, config.optimizer.lr)[0].lm_loss)
    return {"losses": losses, "experts": {layer: torch.cat(own).sum(1) for layer, own in maps.items()}}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "longcat_one_node" else pytest.mark.slow) for name in TOYS]
)
def test_a_toy_learns_with_a_dynamic_number_of_experts(two_ranks, four_ranks, name, summary):
    pool = two_ranks if name.endswith("one_node") else four_ranks
    ranks = pool.run(train_toy, name)
    losses = ranks[0]["losses"]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    config = load_config(path_of(name))
    held = config.budget.experts_per_token
    layers = {layer for rank in ranks for layer in rank["experts"]}
    assert len(layers) == len(load_config(path_of(name), [*TOY, *TOYS[name]]).model.moe_layers)
    for layer in layers:
        experts_T = torch.cat([rank["experts"][layer] for rank in ranks if layer in rank["experts"]]).double()
        assert len(experts_T.unique()) >= 3, layer
        assert experts_T.mean() == pytest.approx(held, rel=0.2), layer
        spread = f"{experts_T.min():g} to {experts_T.max():g}"
        summary.append(f"{name}, layer {layer}: {experts_T.mean():.2f} experts per token, {spread}")


def check_dry_start(name: str, ranks_of_stage: Callable[[range], Sequence[int]], summary: list[str]) -> None:
    config = load_config(path_of(name))
    nodes = 64 if name.endswith("64x8") else 1
    layout = Layout(config, nodes, 8, config.model.vocab_size)
    stages = config.parallel.pipeline
    size = layout.world_size // stages
    chosen = [ranks_of_stage(range(stage * size, (stage + 1) * size)) for stage in range(stages)]
    started = iter(bytes_of_ranks(layout, [rank for ranks in chosen for rank in ranks]))
    for stage, ranks in enumerate(chosen):
        planned = memory_of_stage(layout, stage, 8.0).static
        found = [next(started) for _ in ranks]
        assert found == pytest.approx([planned] * len(ranks), rel=0.01)
        summary.append(
            f"dry start, {name}, stage {stage}, {len(ranks)} ranks: {min(found) / 2**30:.2f} to "
            f"{max(found) / 2**30:.2f} GiB, planned {planned / 2**30:.2f}"
        )


@pytest.mark.parametrize("name", TOYS)
def test_the_start_of_a_rank_takes_the_planned_memory(name, summary):
    """The first and the last rank of every pipeline stage, before the first step."""
    check_dry_start(name, lambda ranks: [ranks[0], ranks[-1]], summary)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TOYS if name.endswith("64x8")])
def test_the_start_of_each_of_512_ranks_takes_the_planned_memory(name, summary):
    check_dry_start(name, list, summary)
