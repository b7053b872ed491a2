"""DynMoE's language case at small scale: do harder tasks use more experts? Fine-tuning by transformers' Trainer.

python examples/finetune_classification.py OUT [OUT ...] with exported models (python -m dynmoe.hf export RUN OUT
--own-code). Without any it makes them: a dense model is trained on source code, converted to experts with each router
(python -m dynmoe.warmstart), trained further, and exported. The tasks are those of code_tasks.py. With the same seed,
all models see the same passages in the same order, and their heads start from the same weights.
"""

import argparse
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from itertools import combinations
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch
from code_tasks import TASKS, samples
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

from dynmoe.hf.held_budget import HeldBudget

TOKENS = 96
TRAIN = 600
TEST = 300
EPOCHS = 3
# The first one defines how difficult a task is.
ROUTERS = {
    "top_k 2": ["model.router.kind=top_k", "model.router.k=2"],
    "top_k 1": ["model.router.kind=top_k", "model.router.k=1"],
    "top_any": ["model.router.kind=top_any"],
    "top_any at 2": [
        "model.router.kind=top_any", "model.router.initial_experts=2", "budget.method=pi", "budget.experts_per_token=2",
    ],
}  # fmt: skip


class Job(NamedTuple):
    """One fine-tuning; ``count`` passages for training."""

    model: Path
    task: str
    seed: int
    count: int


class Outcome(NamedTuple):
    """Test accuracy, and mean experts per token on the test passages before and after fine-tuning."""

    accuracy: float
    before: float
    after: float
    loss: float
    low: float
    high: float


def call(*command: str) -> None:
    print("python", *command, flush=True)
    subprocess.run([sys.executable, *command], check=True)


def train_dense(steps: int) -> Path:
    """Trains a dense model on the source code of Python's library, unless an earlier call did."""
    corpus = Path("data/stdlib")
    run = Path("runs/finetune/dense")
    if not (corpus / "manifest.json").exists():
        call("-m", "data_prep", "stdlib", "--out", str(corpus), "--validation-fraction", "0.05")
    if not run.exists():
        place = [f"run.dir={run.parent}", f"run.name={run.name}", "logging.wandb=disabled"]
        fields = ["model.moe.experts=0", "model.ffn_hidden=256", "parallel.expert=1", f"train.steps={steps}"]
        call("train.py", "configs/quickstart.yaml", *place, *fields)
    return run


def make_models(steps: int) -> list[Path]:
    """Converts the dense model to experts with each router, trains half as long again, and exports the results."""
    dense = train_dense(steps)
    made = []
    for name, fields in ROUTERS.items():
        run = dense.with_name(name.replace(" ", "_"))
        out = run.with_name(f"{run.name}_exported")
        if not run.exists():
            call("-m", "dynmoe.warmstart", str(dense), str(run), "--experts", "8", *fields)
        if not out.exists():
            call("train.py", str(run / "config.yaml"), f"train.steps={steps // 2}")
            call("-m", "dynmoe.hf", "export", str(run), str(out), "--own-code")
        made.append(out)
    return made


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


def load(job: Job):
    """The model with a new head, whose weights depend on the seed and the task only."""
    torch.manual_seed(job.seed)
    return AutoModelForSequenceClassification.from_pretrained(
        job.model, trust_remote_code=True, num_labels=TASKS[job.task].labels, output_router_logits=True
    )


def finetune(job: Job) -> Outcome:
    """Fine-tunes a model on a task, with its budget if it has one."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(job.model, trust_remote_code=True)
    learn, held_out = (
        [{**tokenizer(own["text"], truncation=True, max_length=TOKENS), "labels": own["label"]} for own in split]
        for split in (samples(job.task, False, job.count), samples(job.task, True, TEST))
    )
    model = load(job)
    collate = DataCollatorWithPadding(tokenizer)
    batches = DataLoader(held_out, batch_size=50, collate_fn=collate)
    _, before_T = test(model, batches)
    arguments = TrainingArguments(
        output_dir=str(job.model.with_name(f"{job.model.name}_finetuned")), num_train_epochs=EPOCHS, learning_rate=1e-3,
        per_device_train_batch_size=32, warmup_steps=10, weight_decay=0.01, seed=job.seed, use_cpu=True,
        disable_tqdm=True, report_to="none", save_strategy="no", logging_strategy="no",
    )  # fmt: skip
    callbacks = [HeldBudget()] if HeldBudget.fits(model.config) else []
    trainer = Trainer(model, arguments, collate, train_dataset=learn, callbacks=callbacks)
    trainer.remove_callback(PrinterCallback)
    loss = trainer.train().training_loss
    accuracy, after_T = test(model, batches)
    low, high = after_T.quantile(torch.tensor([0.05, 0.95])).tolist()
    return Outcome(accuracy, before_T.mean().item(), after_T.mean().item(), loss, low, high)


def difficulty(task: str, accuracy: float) -> float:
    """Share of wrong answers relative to guessing: 0 if all are right, 1 if the model only guesses."""
    return (1 - accuracy) / (1 - TASKS[task].chance)


def verdict(difficulties: dict[str, float], experts: dict[str, list[float]]) -> str:
    """Whether harder tasks use more experts: only if they do for every pair of tasks in every seed, of three at least.

    Args:
        difficulties: by task.
        experts: mean experts per token by task, one for each seed.
    """
    pairs = list(combinations(sorted(difficulties, key=difficulties.__getitem__), 2))
    seeds = range(len(experts[pairs[0][0]]))
    rising = [sum(experts[hard][seed] > experts[easy][seed] for easy, hard in pairs) for seed in seeds]
    seen = "seen" if min(rising) == len(pairs) else "not seen at this size"
    if len(difficulties) < 3 or len(seeds) < 3:
        seen = "too few tasks or seeds for a verdict"
    return f"{seen} (the harder task uses more in {', '.join(map(str, rising))} of {len(pairs)} pairs, by seed)"


def values(numbers: list[float], digits: int) -> str:
    """The mean, and each value."""
    each = " ".join(f"{number:.{digits}f}" for number in numbers)
    return f"{mean(numbers):.{digits}f} ({each})"


def report(outcomes: dict[Job, Outcome], models: list[Path], tasks: list[str]) -> None:
    """Prints a table of all tasks, and a verdict for each model in which the number of experts is dynamic."""

    def of(model: Path, task: str, field: str) -> list[float]:
        return [getattr(own, field) for job, own in outcomes.items() if (job.model, job.task) == (model, task)]

    hardness = {task: mean(difficulty(task, own) for own in of(models[0], task, "accuracy")) for task in tasks}
    names = [model.name.removesuffix("_exported") for model in models]
    print("\n| task | chance | difficulty |", " | ".join(names), "|\n" + "|---" * (len(models) + 3) + "|")
    for task in sorted(tasks, key=hardness.__getitem__):
        cells = [values(of(model, task, "accuracy"), 3) for model in models]
        print(f"| {task} | {TASKS[task].chance:.2f} | {hardness[task]:.2f} |", " | ".join(cells), "|")
    for model, name in zip(models, names, strict=True):
        if len({of(model, task, field)[0] for task in tasks for field in ("low", "high")}) == 1:
            continue  # a fixed number of experts
        print(f"\n| task | experts per token of {name} before | after fine-tuning |\n|---|---|---|")
        for task in sorted(tasks, key=hardness.__getitem__):
            print(f"| {task} |", " | ".join(values(of(model, task, when), 3) for when in ("before", "after")), "|")
        for when in ("before", "after") if len(tasks) > 1 else ():
            found = verdict(hardness, {task: of(model, task, when) for task in tasks})
            print(f"Harder tasks use more experts, {name} {when} fine-tuning: {found}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "models", nargs="*", type=Path, metavar="OUT",
        help="exported models, of which the first defines how difficult a task is; default: creates some",
    )  # fmt: skip
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="default: all")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds of the fine-tuning")
    parser.add_argument("--passages", type=int, default=TRAIN, help="passages of each task for training")
    parser.add_argument(
        "--steps", type=int, default=160, help="training steps of the dense model, if models are created"
    )
    parser.add_argument("--processes", type=int, default=2, help="models that are fine-tuned at the same time")
    given = parser.parse_args()
    models = given.models or make_models(given.steps)
    jobs = [
        Job(model, task, seed, given.passages)
        for seed in range(given.seeds)
        for task in given.tasks
        for model in models
    ]
    pool = ProcessPoolExecutor(given.processes, get_context("spawn"), torch.set_num_threads, (1,))
    outcomes = {}
    with pool:
        for job, own in zip(jobs, pool.map(finetune, jobs), strict=True):
            outcomes[job] = own
            print(
                f"{job.model.name}, {job.task}, seed {job.seed}: loss {own.loss:.3f}, "
                f"test accuracy {own.accuracy:.3f}, {own.after:.2f} experts per token "
                f"(5 % of the tokens below {own.low:.2f}, 5 % above {own.high:.2f})",
                flush=True,
            )
    report(outcomes, models, given.tasks)


if __name__ == "__main__":
    main()
