"""Eleven models are exported, trained for a step with Trainer, imported, and trained here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dynmoe.errors import UserError
from dynmoe.hf.export import export
from dynmoe.hf.importing import import_checkpoint
from tests.hf.cases import OWN, STANDARD, begin, run_decoder, some_tokens, train_run
from tests.hf.test_export import read
from tests.hf.test_import import imported

MODELS = {
    **{name: STANDARD[name] for name in STANDARD if name != "qwen3_moe, dense"},
    **{name: OWN[name] for name in ("top_p", "top_any improved", "sigmoid", "dtop_p", "quantile running")},
}
FAST = ("qwen2_moe, shared and dense", "top_any improved")
TRAINING = [
    "data.sequence_length=32", "train.global_batch=4", "train.micro_batch=4", "train.steps=20", "optimizer.lr=1e-2",
    "schedule.warmup_steps=0", "logging.interval=1", "eval.batches=2",
]  # fmt: skip


def fine_tune(model, folder: Path) -> None:
    """Runs one step of Trainer on two sequences."""
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        folder, max_steps=1, per_device_train_batch_size=2, learning_rate=1e-2, weight_decay=0.1, use_cpu=True,
        report_to=[], save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    data = [{"input_ids": tokens, "labels": tokens} for tokens in some_tokens()]
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.train()
    trainer.save_model(folder)


def frozen(model):
    """Freezes the zeros of Qwen2-MoE that our decoder does not have."""
    for name, parameter in model.named_parameters():
        if name.endswith(("_proj.bias", "shared_expert_gate.weight")):
            parameter.requires_grad_(False)
    return model


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in FAST else pytest.mark.slow) for n in MODELS])
def test_an_exported_and_fine_tuned_model_is_imported_and_trains(corpus_dir, tmp_path, name):
    begun = begin(corpus_dir, tmp_path / "origin", MODELS[name])
    export(begun.path, tmp_path / "out")
    fine_tune(frozen(read(tmp_path / "out")), tmp_path / "tuned")
    run = tmp_path / "run"
    tokens = some_tokens()
    _, decoder = imported(tmp_path / "tuned", run, f"data.dirs=[{corpus_dir}]", *TRAINING)
    found = run_decoder(decoder, tokens)[0]
    with torch.no_grad():
        torch.testing.assert_close(found, read(tmp_path / "tuned")(tokens).logits, rtol=0, atol=1e-5)
    assert (found - run_decoder(begun.decoder, tokens)[0]).abs().max() > 0.05, "the step changed nothing"

    rows, batch = train_run(run, corpus_dir, tmp_path, 1)
    with torch.no_grad():
        first = decoder.train()(batch.tokens_BS, batch.labels_BS).item()
    assert rows[0]["train/lm_loss"] == pytest.approx(first, rel=1e-5)
    assert rows[-1]["train/step"] == 20
    assert rows[-1]["train/lm_loss"] < first - 0.3


def test_gates_and_biases_that_were_not_frozen_are_refused_with_the_fix(corpus_dir, tmp_path):
    begun = begin(corpus_dir, tmp_path / "origin", MODELS["qwen2_moe, shared and dense"])
    export(begun.path, tmp_path / "out")
    fine_tune(read(tmp_path / "out"), tmp_path / "tuned")
    words = r"not zeros: model\.layers\.0\.self_attn\.q_proj\.bias, .* with them frozen: requires_grad_\(False\)$"
    with pytest.raises(UserError, match=words):
        import_checkpoint(tmp_path / "tuned", tmp_path / "run")


LOSSES = ["model.router.kind=top_p", "model.router.entropy_loss=0.5", "model.router.balance_loss=0"]


def weights_after_a_step(out: Path, folder: Path, head: str, batch: int) -> dict[str, torch.Tensor]:
    """Weights after one step of gradient descent on four sequences, ``batch`` of them in each pass."""
    import transformers

    torch.manual_seed(0)
    model = getattr(transformers, head).from_pretrained(out, trust_remote_code=True, output_router_logits=True)
    arguments = transformers.TrainingArguments(
        folder, max_steps=1, per_device_train_batch_size=batch, gradient_accumulation_steps=4 // batch, optim="sgd",
        learning_rate=0.1, max_grad_norm=0, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    tokens = torch.randint(3, 400, (4, 9), generator=torch.Generator().manual_seed(1))
    labels = tokens if head == "AutoModelForCausalLM" else torch.tensor([0, 1, 1, 0])
    data = [{"input_ids": own, "labels": label} for own, label in zip(tokens, labels, strict=True)]
    transformers.Trainer(model, arguments, train_dataset=data).train()
    return model.state_dict()


@pytest.mark.parametrize("head", ["AutoModelForCausalLM", "AutoModelForSequenceClassification"])
def test_accumulation_changes_nothing(corpus_dir, tmp_path, head):
    """Neither the loss of the head nor the routers' losses may grow with the number of passes."""
    export(begin(corpus_dir, tmp_path / "origin", LOSSES).path, tmp_path / "out")
    whole, parts = (weights_after_a_step(tmp_path / "out", tmp_path / "tuned", head, batch) for batch in (4, 1))
    before = weights_after_a_step(tmp_path / "out", tmp_path / "tuned", head, 4)
    for name, weight in whole.items():
        torch.testing.assert_close(parts[name], weight, rtol=1e-4, atol=1e-6, msg=name)
        assert torch.equal(before[name], weight)


def test_predictions_are_the_logits_alone(corpus_dir, tmp_path):
    """What routers return cannot be joined over batches of different lengths."""
    from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

    export(begin(corpus_dir, tmp_path / "origin", LOSSES).path, tmp_path / "out")
    model = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", trust_remote_code=True, output_router_logits=True, num_labels=3
    )
    data = [{"input_ids": torch.arange(3, end), "labels": torch.tensor(1)} for end in (9, 12)]
    arguments = TrainingArguments(
        tmp_path / "tuned", per_device_eval_batch_size=1, use_cpu=True, report_to=[], disable_tqdm=True
    )
    found = Trainer(model, arguments).predict(data)
    with torch.no_grad():
        expected = torch.cat([model.eval()(row["input_ids"][None]).logits for row in data])
    torch.testing.assert_close(torch.from_numpy(found.predictions), expected)
