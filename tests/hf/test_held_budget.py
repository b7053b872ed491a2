"""An exported model holds its budget in fine-tuning, by the rule of training."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from dynmoe.errors import UserError
from dynmoe.hf.export import export
from dynmoe.hf.held_budget import HeldBudget
from dynmoe.moe.updates import RouterUpdates
from tests.hf.cases import BATCH, OWN, begin, some_tokens
from tests.hf.test_export import read

STEPS = 3
PADDING = 4
HELD = {
    "top_p": [*OWN["top_p"], "budget.method=pi", "budget.experts_per_token=1.5"],
    "top_any": [*OWN["top_any improved"], "budget.method=pi", "budget.experts_per_token=2.5", "budget.integral=0.7"],
    "top_any, balanced": [*OWN["top_any improved"], "budget.method=loss_free", "budget.experts_per_token=2.5"],
    "top_any, all layers": [
        *OWN["top_any improved"], "budget.method=pi", "budget.experts_per_token=2", "budget.scope=global",
    ],
}  # fmt: skip


def held_in_training(begun) -> dict[str, torch.Tensor]:
    """State that the budget has moved after ``STEPS`` steps on the same tokens, without a change of weights."""
    decoder = begun.decoder.train()
    updates = RouterUpdates(begun.config, decoder.moe_layers, decoder.context.groups, None, torch.device("cpu"))
    for step in range(1, STEPS + 1):
        spec = updates.spec(step)
        with decoder.context.override(update_statistics=spec, target_experts=updates.target_experts(step)):
            decoder.hidden(some_tokens())
        updates.apply([layer.drain() for layer in decoder.moe_layers], spec, step)
    return moved([layer.router for layer in decoder.moe_layers])


def moved(routers) -> dict[str, torch.Tensor]:
    state = [{name.removesuffix("_E"): value for name, value in router.named_buffers()} for router in routers]
    return {name: torch.stack([own[name] for own in state]) for name in ("p", "offset") if name in state[0]}


def fine_tune(model, folder, padding: int = PADDING) -> None:
    """``STEPS`` steps on the same tokens with a learning rate of 0, with padding on the left."""
    from transformers import Trainer, TrainingArguments

    tokens = torch.cat([torch.full((BATCH, padding), 7), some_tokens()], dim=1)
    mask = torch.ones_like(tokens)
    mask[:, :padding] = 0
    labels = tokens.masked_fill(mask == 0, -100)
    rows = zip(tokens, mask, labels, strict=True)
    data = [dict(zip(("input_ids", "attention_mask", "labels"), row, strict=True)) for row in rows]
    arguments = TrainingArguments(
        folder, max_steps=STEPS, per_device_train_batch_size=BATCH, learning_rate=0.0, use_cpu=True, report_to=[],
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=data, callbacks=[HeldBudget()]).train()


@pytest.mark.parametrize("name", HELD)
def test_fine_tuning_moves_what_training_moves(corpus_dir, tmp_path, name):
    begun = begin(corpus_dir, tmp_path / "run", HELD[name])
    export(begun.path, tmp_path / "out")
    model = read(tmp_path / "out")
    assert HeldBudget.fits(model.config)
    routers = [layer.mlp.router for layer in model.model.layers]
    before = {key: value.clone() for key, value in moved(routers).items()}
    fine_tune(model, tmp_path / "tuned")
    expected = held_in_training(begun)
    found = moved(routers)
    assert set(found) == set(expected)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6)
        moves = (value - before[key]).abs().view(len(value), -1).amax(dim=1)
        assert (moves > 1e-3).all(), "nothing has moved"
    assert not any(router._forward_hooks for router in routers)
    assert not model._forward_pre_hooks


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (OWN["top_p"], r"router\.budget\.method=none: is not held .*; export a run with budget\.method=pi"),
        (
            [*HELD["top_p"], "model.router.budgets=[1,1.5,2]"],
            r"router\.budgets=\[1\.0, 1\.5, 2\.0\]: only one budget is held in fine-tuning; use \[\]",
        ),
    ],
)
def test_exports_without_one_budget_are_refused(corpus_dir, tmp_path, fields, words):
    export(begin(corpus_dir, tmp_path / "run", fields).path, tmp_path / "out")
    model = read(tmp_path / "out")
    assert not HeldBudget.fits(model.config)
    with pytest.raises(UserError, match=words):
        fine_tune(model, tmp_path / "tuned")


@pytest.mark.parametrize("several", ["world_size", "n_gpu"])
def test_more_than_one_device_with_a_part_of_the_batch_is_refused(several):
    arguments = SimpleNamespace(**({"world_size": 1, "n_gpu": 1} | {several: 2}))
    model = SimpleNamespace(config=SimpleNamespace(router={"budget": {"method": "pi"}}))
    with pytest.raises(UserError, match=rf"^{several}=2: a budget is held .*; (start one|set CUDA_VISIBLE_DEVICES)"):
        HeldBudget().on_train_begin(arguments, None, None, model=model)
