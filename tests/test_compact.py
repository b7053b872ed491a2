"""Compaction removes inactive experts from a checkpoint without changing the logits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from dynmoe.__main__ import VERBS
from dynmoe.compact import _configuration, compact, slots_to_keep
from dynmoe.config import load_config
from dynmoe.errors import UserError
from dynmoe.train.engine import take_step
from tests.train.cases import TrainingProcess, read_rows


@pytest.fixture(scope="module")
def adapted(corpus_dir, tmp_path_factory) -> Path:
    """A short run in which adaptation removed experts and added none."""
    runs = tmp_path_factory.mktemp("adapted") / "runs"
    process = TrainingProcess(
        corpus_dir, runs, "train.steps=8", "model.moe.experts=6", "model.moe.active_at_start=5",
        "adaptation.addition_share=0.99", "adaptation.removal_share=0.9", "eval.interval=0",
    )  # fmt: skip
    assert process.wait() == 0, process.output()
    assert any(event["change"] == "removed" for event in read_rows(runs / "tiny" / "events.jsonl"))
    return runs / "tiny"


def logits_of(run: str, vocab_size: int) -> dict[str, torch.Tensor]:
    """Logits and state of the latest checkpoint, and results of two further training steps, on a rank of a pool."""
    from dynmoe.data.batches import Batch
    from dynmoe.engines.deepspeed import DeepSpeedEngine
    from dynmoe.train.checkpoint import latest_valid

    config = load_config(f"{run}/config.yaml", ["parallel.expert=1", "adaptation.interval=0"])
    engine = DeepSpeedEngine(config, vocab_size)
    engine.load(latest_valid(Path(run) / "checkpoints").path)
    tokens = torch.arange(96).view(2, 48) % vocab_size
    before = engine.logits(tokens).clone()
    batch = Batch(tokens[:, :-1], tokens[:, 1:])
    for _ in range(2):
        take_step(engine, [batch, batch], 1e-2)
    size = torch.tensor(sum(parameter.numel() for parameter in engine.module.parameters()))
    return {"before": before, "after": engine.logits(tokens).clone(), "size": size}


@pytest.mark.parametrize("multiple", [1, 2])
def test_compacted_run_has_fewer_parameters_and_the_same_logits_before_and_after_training(
    one_rank, adapted, tmp_path, multiple
):
    config, kept = compact(adapted, tmp_path / "small", multiple)
    assert load_config(tmp_path / "small" / "config.yaml") == config
    assert config.model.moe.experts_by_layer == [len(slots) for slots in kept.values()]
    assert min(config.model.moe.experts_by_layer) < 6
    assert all(len(slots) % multiple == 0 for slots in kept.values())
    assert config.parallel.expert == (2 if all(len(slots) % 2 == 0 for slots in kept.values()) else 1)
    rows = json.loads(next((tmp_path / "small" / "checkpoints").glob("*/manifest.json")).read_text())
    vocab_size = 448
    (whole,), (small,) = (one_rank.run(logits_of, str(run), vocab_size) for run in (adapted, tmp_path / "small"))
    removed = sum(6 - len(slots) for slots in kept.values())
    per_expert = 3 * 32 * 32 + 32 + 1  # weights, prototype, threshold
    assert whole["size"] - small["size"] == removed * per_expert
    torch.testing.assert_close(small["before"], whole["before"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(small["after"], whole["after"], rtol=1e-4, atol=1e-5)
    assert not torch.equal(small["before"], small["after"])
    assert rows["ranks"] == 1


@pytest.mark.slow
def test_training_resumes_in_the_compacted_run(adapted, corpus_dir, tmp_path):
    compact(adapted, tmp_path / "runs" / "tiny")
    counts = load_config(tmp_path / "runs" / "tiny" / "config.yaml").model.moe.experts_by_layer
    process = TrainingProcess(
        corpus_dir, tmp_path / "runs", "train.steps=10", "model.moe.experts=6", "eval.interval=0", "parallel.expert=1",
        f"model.moe.experts_by_layer={counts}".replace(" ", ""), "model.moe.active_at_start=null",
        "model.router.initial_experts=null",
        "adaptation.interval=0",
    )  # fmt: skip
    assert process.wait() == 0, process.output()
    assert [row["train/step"] for row in read_rows(tmp_path / "runs" / "tiny" / "metrics.jsonl")] == [9, 10]
    assert f"of {min(counts)}" in process.output()


def test_runs_that_cannot_be_compacted_are_refused_with_the_reason(adapted, tmp_path):
    with pytest.raises(UserError, match="exists; name a new directory"):
        compact(adapted, adapted)
    with pytest.raises(UserError, match="nothing to remove"):
        compact(adapted, tmp_path / "small", multiple=6)
    shutil.copytree(adapted, tmp_path / "grouped")
    path = tmp_path / "grouped" / "config.yaml"
    text = path.read_text().replace("topk_group: 1", "topk_group: 3").replace("n_group: 1", "n_group: 3")
    path.write_text(text)
    with pytest.raises(UserError, match=r"^model\.router\.n_group=3: without .* in other groups; keep the slots$"):
        compact(tmp_path / "grouped", tmp_path / "small")
    shutil.copytree(adapted, tmp_path / "broken")
    for shard in (tmp_path / "broken" / "checkpoints").glob("*/dense.safetensors"):
        shard.write_bytes(b"")
    with pytest.raises(UserError, match="no valid checkpoint"):
        compact(tmp_path / "broken", tmp_path / "small")
    with pytest.raises(UserError, match=r"config\.yaml cannot be read"):
        compact(tmp_path / "nowhere", tmp_path / "small")


def test_slots_to_keep_equal_examples_worked_out_by_hand():
    active = [False, True, False, True, True, False]
    assert slots_to_keep(active, 1) == [1, 3, 4]
    assert slots_to_keep(active, 2) == [0, 1, 3, 4]
    assert slots_to_keep(active, 3) == [1, 3, 4]


def test_a_maximum_above_the_experts_that_are_left_is_dropped(tmp_path):
    router = ["model.router.kind=top_any", "model.router.max_experts=5", "model.moe.experts=6"]
    config = load_config(None, ["run.name=small", *router])
    for counts, maximum in (([5, 4, 3, 4], 5), ([4, 4, 3, 4], None)):
        assert _configuration(config, tmp_path / "small", counts).model.router.max_experts == maximum


def test_a_maximum_of_the_layers_that_predict_further_tokens_is_dropped_with_them(tmp_path):
    router = ["model.router.kind=top_any", "model.router.max_experts=4", "model.moe.experts=6"]
    config = load_config(None, ["run.name=small", *router, "model.layers=2", "model.mtp.layers=1"])
    for counts, maximum in (([3, 3, 6], None), ([3, 4, 6], 4)):
        model = _configuration(config, tmp_path / "small", counts).model
        assert model.router.max_experts == 4
        assert model.without_mtp().router.max_experts == maximum


def test_the_command_lists_its_verbs_and_names_an_unknown_one(capsys, monkeypatch):
    from dynmoe.__main__ import main

    monkeypatch.setattr("sys.argv", ["dynmoe", "--help"])
    main()
    shown = capsys.readouterr().out
    assert all(verb in shown for verb in VERBS)
    monkeypatch.setattr("sys.argv", ["dynmoe", "shrink"])
    with pytest.raises(UserError, match="dynmoe shrink: unknown verb; use one of checkpoint, "):
        main()


def test_rows_of_several_budgets_keep_their_number():
    import torch

    from dynmoe.compact import _select

    offsets = torch.arange(12.0).view(3, 4)
    for shape in (offsets, offsets[0]):
        found = _select("buffer|layers.0.moe.router.offset_E", shape, {0: [0, 2]})
        assert torch.equal(found, shape[..., [0, 2]])
    prototypes = torch.arange(8.0).view(2, 4)
    assert torch.equal(_select("layers.0.moe.router.prototypes_DE", prototypes, {0: [3]}), prototypes[:, [3]])
