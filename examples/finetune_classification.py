"""DynMoE's language case at small scale: classification with top-any and top-k routers, by transformers' Trainer.

python examples/finetune_classification.py OUT [OUT ...] with exported models (python -m dynmoe.hf export RUN OUT
--own-code). Without any it makes them: a dense model is trained on source code, converted to experts with each router
(python -m dynmoe.warmstart), and exported. The task: from which package of Python's library a few lines are.
"""

import argparse
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)
from transformers.utils import logging

PACKAGES = ("asyncio", "email", "multiprocessing", "unittest", "xml")
LINES = 12
TOKENS = 96
EPOCHS = 2
ROUTERS = {
    "top_k 1": ["model.router.kind=top_k", "model.router.k=1"],
    "top_k 2": ["model.router.kind=top_k", "model.router.k=2"],
    "top_any": ["model.router.kind=top_any"],
}


def make_models(steps: int) -> list[Path]:
    """Trains a dense model on source code, converts it to experts with each router, and exports the results."""

    def call(*command: str) -> None:
        print("python", *command, flush=True)
        subprocess.run([sys.executable, *command], check=True)

    runs = Path("runs/finetune")
    dense = runs / "dense"
    corpus = Path("data/stdlib")
    made = []
    if not (corpus / "manifest.json").exists():
        call("-m", "data_prep", "stdlib", "--out", str(corpus), "--validation-fraction", "0.05")
    if not dense.exists():
        fields = ["model.moe.experts=0", "model.ffn_hidden=256", "parallel.expert=1", f"train.steps={steps}"]
        call(
            "train.py",
            "configs/quickstart.yaml",
            f"run.dir={runs}",
            "run.name=dense",
            "logging.wandb=disabled",
            *fields,
        )
    for name, fields in ROUTERS.items():
        run = runs / name.replace(" ", "_")
        out = runs / f"{name.replace(' ', '_')}_exported"
        if not run.exists():
            call("-m", "dynmoe.warmstart", str(dense), str(run), "--experts", "8", *fields)
        if not out.exists():
            call("-m", "dynmoe.hf", "export", str(run), str(out), "--own-code")
        made.append(out)
    return made


def read_passages() -> tuple[list[dict], list[dict]]:
    """Labelled passages of the packages for training and for the test; each file is in one of the two."""
    splits: tuple[list[dict], list[dict]] = ([], [])
    for label, package in enumerate(PACKAGES):
        files = sorted((Path(sysconfig.get_paths()["stdlib"]) / package).rglob("*.py"))
        for number, file in enumerate(files):
            lines = [line for line in file.read_text().splitlines() if line.strip()]
            passages = ["\n".join(lines[start : start + LINES]) for start in range(0, len(lines), LINES)]
            splits[number % 4 == 3].extend({"text": text, "label": label} for text in passages)
    return splits


@torch.no_grad()
def test(model, batches: DataLoader) -> tuple[float, Tensor]:
    """Accuracy, and experts of each token averaged over layers, [all tokens]."""
    right = []
    experts = []
    for batch in batches:
        out = model.eval()(**batch, output_router_logits=True)
        right.append(out.logits.argmax(dim=1) == batch["labels"])
        experts.append(out.experts_per_token.float().mean(dim=0)[batch["attention_mask"].bool()])
    return torch.cat(right).float().mean().item(), torch.cat(experts)


def finetune(path: Path, splits: tuple[list[dict], list[dict]], seed: int) -> tuple[float, float, Tensor]:
    """Fine-tunes a model; returns mean training loss, test accuracy, and experts of each test token."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
    model = AutoModelForSequenceClassification.from_pretrained(
        path, trust_remote_code=True, num_labels=len(PACKAGES), output_router_logits=True
    )
    learn, held_out = (
        [{**tokenizer(own["text"], truncation=True, max_length=TOKENS), "labels": own["label"]} for own in split]
        for split in splits
    )
    collate = DataCollatorWithPadding(tokenizer)
    arguments = TrainingArguments(
        output_dir=str(path.with_name(f"{path.name}_finetuned")), num_train_epochs=EPOCHS, learning_rate=1e-3,
        per_device_train_batch_size=32, warmup_steps=20, weight_decay=0.01, seed=seed, use_cpu=True, disable_tqdm=True,
        report_to="none", save_strategy="no", logging_strategy="no",
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=learn, data_collator=collate)
    trainer.remove_callback(PrinterCallback)
    done = trainer.train()
    return done.training_loss, *test(model, DataLoader(held_out, batch_size=64, collate_fn=collate))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path, metavar="OUT", help="exported models; default: creates some")
    parser.add_argument(
        "--steps", type=int, default=160, help="training steps of the dense model, if models are created"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the fine-tuning")
    given = parser.parse_args()
    logging.set_verbosity_error()
    models = given.models or make_models(given.steps)
    learn, held_out = splits = read_passages()
    shares = torch.bincount(torch.tensor([own["label"] for own in held_out])) / len(held_out)
    print(
        f"{len(learn)} passages for training, {len(held_out)} for the test, {shares.max():.3f} of them of one package"
    )
    for path in models:
        loss, accuracy, experts_T = finetune(path, splits, given.seed)
        low, high = experts_T.quantile(torch.tensor([0.05, 0.95])).tolist()
        print(
            f"{path.name}: loss {loss:.3f}, test accuracy {accuracy:.3f}, {experts_T.mean():.2f} experts per token "
            f"(5 % of the tokens below {low:.2f}, 5 % above {high:.2f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
