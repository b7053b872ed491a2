"""Runs lm-evaluation-harness on our models: its tasks, requests, metrics and aggregation; our scoring and experts."""

from __future__ import annotations

import difflib
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval import simple_evaluate
from lm_eval.api import task as task_module
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from dynmoe.data.tokenizer import Tokenizer
from dynmoe.errors import UserError, first_line
from dynmoe.evaluate.harness_model import HarnessModel
from dynmoe.evaluate.models import ScoredModel, WholeModel
from dynmoe.evaluate.scoring import ExpertUse, Passage, Progress, Score, score
from dynmoe.train.scores import Scores

_GENERATES = "generate_until"


@dataclass(frozen=True)
class Tasks:
    """Loaded tasks and groups of tasks."""

    manager: TaskManager
    roots: list[Task | Group]


def open_tasks(names: Sequence[str], field: str, *, folder: Path | None = None, generation: bool = True) -> Tasks:
    """Finds tasks, groups and tags by name or YAML file, and loads their data.

    Args:
        names: names or files; a file's ``data_files`` are relative to the working directory.
        field: the option or field that gave the names, for messages.
        folder: folder of more YAML files with named tasks. If it provides all names that are not files, the harness's
            own tasks are not loaded.
        generation: whether to allow tasks that generate text.

    Raises:
        UserError: a name is unknown, data cannot be read, or a task cannot be scored here.
    """
    own = TaskManager(include_path=folder, include_defaults=False)
    unknown = [name for name in names if name not in own.all_tasks and not Path(name).is_file()]
    # Indexing the harness's own names reads thousands of files.
    manager = TaskManager(include_path=folder) if unknown else own
    roots: list[Task | Group] = []
    for name in names:
        if name in unknown and name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, 3)
            cure = f"did you mean {', '.join(near)}?" if near else "use a task of lm-evaluation-harness or a YAML file"
            raise UserError(f"{field}: {name!r} is not a known task; {cure}")
        try:
            found = manager.load([name])
        except Exception as error:  # any error while tasks and data are read
            cure = "fix it, or if its data is on the hub, download it once with network access (HF_HOME caches it)"
            raise UserError(f"{field}: {name} cannot be loaded ({first_line(error)}); {cure}") from error
        children = {child for members in found.get("group_map", {}).values() for child in members}
        groups = [group for key, group in found.get("groups", {}).items() if key not in children]
        roots += groups or found["tasks"].values()
        for key, task in found["tasks"].items():
            _check_task(task, key, field, generation)
    try:
        manager.load(roots)
    except ValueError as error:
        raise UserError(f"{field}: {first_line(error)}; list it only once") from None
    return Tasks(manager, roots)


def _check_task(task: Task, name: str, field: str, generation: bool) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        cure = "export the model, and run it with the harness: lm_eval --confirm_run_unsafe_code"
        raise UserError(f"{field}: {name} executes code that the model writes; {cure}")
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"{field}: {name} is multimodal; remove it")
    if task.OUTPUT_TYPE == _GENERATES and not generation:
        cure = "evaluate it after training: python -m dynmoe.evaluate RUN --tasks"
        raise UserError(f"{field}: {name} generates text, which takes too long during training; {cure} {name}")


@dataclass(frozen=True)
class TaskScores:
    """Results of tasks.

    Attributes:
        scores: figures of each task and group by name, with experts per token.
        cut: number of requests of each task that were truncated at the beginning.
        report: the harness's report without the documents.
    """

    scores: dict[str, Scores]
    cut: dict[str, int]
    report: dict[str, Any]


def score_tasks(
    model: ScoredModel, tasks: Tasks, progress: Progress, *, shots: int | None = None, limit: int | None = None,
    bootstrap: int = 100_000,
) -> TaskScores:  # fmt: skip
    """Runs the harness; if the model is distributed, on every rank, and the first rank of each host has the result.

    Args:
        progress: called after each forward pass.
        shots: examples before each question; None: as each task specifies.
        limit: maximum number of documents per task; None: all.
        bootstrap: samples for standard errors without a formula; 0: no standard errors.
    """
    harness = HarnessModel(
        model.tokenizer, model.config.data.sequence_length, partial(score, model, progress=progress),
        model if isinstance(model, WholeModel) else None, progress,
    )  # fmt: skip
    report = _run(harness, tasks, shots, limit, bootstrap)
    if report is None:
        return TaskScores({}, harness.cut, {})
    scores = {
        name: _figures(own) | harness.use.figures(_leaves(name, report["group_subtasks"]))
        for name, own in report["results"].items()
    }
    return TaskScores(scores, harness.cut, report)


def rehearse(tasks: Tasks, tokenizer: Tokenizer, longest: int, limit: int | None, shots: int | None = None) -> None:
    """Builds every request of the tasks and computes every metric from made-up scores, to find errors early.

    Raises:
        UserError: a request cannot be scored.
    """

    def unscored(passages: Sequence[Passage], use: ExpertUse) -> list[Score]:
        return [Score(-1.0, False) for _ in passages]

    _run(HarnessModel(tokenizer, longest, unscored, None, lambda done, of: None), tasks, shots, limit, 0)


def _run(harness: HarnessModel, tasks: Tasks, shots: int | None, limit: int | None, bootstrap: int) -> Any:
    with _keeping_random_state(), _without_bars():
        return simple_evaluate(
            harness, tasks=list(tasks.roots), task_manager=tasks.manager, num_fewshot=shots, limit=limit,
            bootstrap_iters=bootstrap, log_samples=False,
        )  # fmt: skip


def _figures(result: Mapping[str, Any]) -> Scores:
    """Figures of a task by name; the harness names them like ``acc,none`` and ``acc_stderr,none``."""
    figures = {}
    for key, value in result.items():
        metric, comma, filtered = key.partition(",")
        if comma and isinstance(value, (int, float)):
            error = "_stderr" if metric.endswith("_stderr") else ""
            name = metric.removesuffix("_stderr") + ("" if filtered == "none" else f".{filtered}")
            figures[name + error] = float(value)
    return figures


def _leaves(name: str, children: Mapping[str, Sequence[str]]) -> list[str]:
    """Tasks of a group and of its subgroups; a task returns itself."""
    return [leaf for child in children[name] for leaf in _leaves(child, children)] if children.get(name) else [name]


@contextmanager
def _keeping_random_state() -> Iterator[None]:
    """Restores the state of random generators, all of which the harness seeds, so that training is unaffected."""
    ours = random.getstate()
    numpy_state = np.random.get_state()
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_initialized() else []):
        try:
            yield
        finally:
            random.setstate(ours)
            np.random.set_state(numpy_state)


@contextmanager
def _without_bars() -> Iterator[None]:
    """Disables the harness's progress bars, which it draws for each task on every rank regardless of its options."""
    bars = task_module.tqdm
    task_module.tqdm = lambda items, **options: items
    try:
        yield
    finally:
        task_module.tqdm = bars
