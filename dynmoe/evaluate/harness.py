"""lm-evaluation-harness over our models: its tasks, requests, metrics and aggregation; our scoring and experts."""

from __future__ import annotations

import difflib
import json
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval import simple_evaluate
from lm_eval.api import task as task_module
from lm_eval.api.group import Group
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import Task
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from dynmoe.errors import UserError, first_line
from dynmoe.evaluate.models import ScoredModel, WholeModel
from dynmoe.evaluate.scoring import ExpertUse, Passage, Progress, Score, rows_of_pass, score
from dynmoe.generate import continue_tokens
from dynmoe.model.sampling import Sampling
from dynmoe.train.scores import Scores

_GENERATES = "generate_until"


class HarnessModel(TemplateLM):
    """A model of ours as the harness asks it, with the conventions of the harness's own models of Hugging Face.

    A context begins as it is given: nothing is put before it, but the end of a document where it is empty. What is
    longer than a sequence of the training loses its beginning, and is counted in ``cut``, by task.

    Args:
        model: the model; every rank of a spread one asks the same.
        progress: is told of each pass.

    Attributes:
        use: experts of the tokens of each task: contexts and continuations, as often as they are computed.
    """

    def __init__(self, model: ScoredModel, progress: Progress) -> None:
        super().__init__()
        self._model, self._tokenizer, self._progress = model, model.tokenizer, progress
        self._longest = model.config.data.sequence_length
        self._tasks: list[str] = []
        self.use = ExpertUse()
        self.cut: dict[str, int] = {}

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.eod

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        return self._tokenizer.encode(string)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Of each continuation after its context: log-probability, and whether greedy decoding would write it."""
        self._tasks = [request.task_name for request in requests]
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **options: Any
    ) -> list[tuple[float, bool]]:
        passages = [
            self._passage(task, context, continuation, text[1])
            for task, (text, context, continuation) in zip(self._tasks, requests, strict=True)
        ]
        return [(own.log_prob, own.greedy) for own in self._score(passages)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-probability of each text, in windows of the trained length whose tokens are each scored once."""
        passages: list[Passage] = []
        ends = []
        for request in requests:
            (text,) = request.args
            windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self._longest, 1)
            passages += [
                Passage([*context, *scored], len(scored), request.task_name)
                for context, scored in map(make_disjoint_window, windows)
            ]
            ends.append(len(passages))
        scores = self._score(passages)
        starts = [0, *ends[:-1]]
        return [sum(own.log_prob for own in scores[a:b]) for a, b in zip(starts, ends, strict=True)]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """The text that follows each context, up to a stop sequence, the end of the document, or its limit.

        Only of a whole model: :func:`open_tasks` refuses such tasks while training.
        """
        alike: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            alike[json.dumps(request.args[1], sort_keys=True)].append(number)
        rows, written = rows_of_pass(self._model, self._longest), dict[int, str]()
        for numbers in alike.values():
            numbers.sort(key=lambda number: -len(requests[number].args[0]))
            for start in range(0, len(numbers), rows):
                own = numbers[start : start + rows]
                written |= zip(own, self._write([requests[number] for number in own]), strict=True)
                self._progress(len(written), len(requests))
        return [written[number] for number in range(len(requests))]

    def _write(self, requests: Sequence[Instance]) -> list[str]:
        """Continues the contexts of requests with the same settings together."""
        assert isinstance(self._model, WholeModel)
        settings = normalize_gen_kwargs(requests[0].args[1])
        num_tokens, stops = settings["max_gen_toks"], settings["until"]
        if num_tokens >= self._longest:
            problem = f"writes up to {num_tokens} tokens, and data.sequence_length is {self._longest}"
            raise UserError(f"task {requests[0].task_name}: {problem}; give it a smaller max_gen_toks")
        sampling = Sampling(
            settings.get("temperature", 1.0) if settings["do_sample"] else 0.0,
            top_k=int(settings.get("top_k", 0)), top_p=float(settings.get("top_p", 1.0)),
        )  # fmt: skip
        room = self._longest - num_tokens
        prompts = [
            self._cut(request.task_name, self.tok_encode(request.args[0]) or [self.eot_token_id], room)
            for request in requests
        ]
        written: list[list[int]] = [[] for _ in prompts]
        texts = [""] * len(prompts)
        computed = [len(prompt) for prompt in prompts]  # tokens of each that a pass computes; 0: it has ended
        for step in continue_tokens(self._model.trained, prompts, num_tokens, sampling):
            for row, token in enumerate(step.tokens):
                if computed[row] == 0:
                    continue
                experts_LS = step.experts_LBS[:, row, -computed[row] :]
                self.use.add(requests[row].task_name, experts_LS.numel(), int(experts_LS.sum()))
                written[row] += [] if token is None else [token]
                texts[row] = self._tokenizer.decode(written[row])
                computed[row] = int(token is not None and not any(stop and stop in texts[row] for stop in stops))
            if not any(computed):
                break
        return [postprocess_generated_text(text, stops, None) for text in texts]

    def _score(self, passages: Sequence[Passage]) -> list[Score]:
        return score(self._model, passages, self.use, self._progress)

    def _passage(self, task: str, context: list[int], continuation: list[int], text: str) -> Passage:
        if not continuation:
            raise UserError(f"task {task}: the continuation {text!r} has no token of its own; begin it with a space")
        if len(continuation) > self._longest:
            problem = f"a continuation has {len(continuation)} tokens, and data.sequence_length is {self._longest}"
            raise UserError(f"task {task}: {problem}; leave the task out")
        return Passage(self._cut(task, [*context, *continuation], self._longest + 1), len(continuation), task)

    def _cut(self, task: str, tokens: list[int], most: int) -> list[int]:
        """The last ``most`` tokens."""
        if len(tokens) > most:
            self.cut[task] = self.cut.get(task, 0) + 1
        return tokens[-most:]


@dataclass(frozen=True)
class Tasks:
    """Tasks and groups of tasks with their data."""

    manager: TaskManager
    roots: list[Task | Group]


def open_tasks(names: Sequence[str], field: str, *, folder: Path | None = None, generation: bool = True) -> Tasks:
    """Finds tasks, groups and tags by name or by YAML file, and reads their data.

    Args:
        names: of them; a file's ``data_files`` are looked for from the working directory.
        field: what the names were given by, for messages.
        folder: of more YAML files, whose tasks are known by name. Where all names are files, the harness's own tasks
            are not.
        generation: tasks that write text are allowed.

    Raises:
        UserError: an unknown name, data that cannot be read, or a task that cannot be scored here.
    """
    # To know the harness's own names thousands of files are read.
    manager = TaskManager(include_path=folder, include_defaults=not all(Path(name).is_file() for name in names))
    roots: list[Task | Group] = []
    for name in names:
        try:
            found = manager.load([name])
        except KeyError:
            near = difflib.get_close_matches(name, manager.all_tasks, 3)
            cure = f"did you mean {', '.join(near)}?" if near else "name a task of lm-evaluation-harness or a YAML file"
            raise UserError(f"{field}: {name!r} is no task; {cure}") from None
        except Exception as error:  # of whatever reads data
            cure = "mend it, or where its data is on the hub, fetch it once where there is a network (HF_HOME keeps it)"
            raise UserError(f"{field}: {name} cannot be loaded ({first_line(error)}); {cure}") from error
        children = {child for own in found.get("group_map", {}).values() for child in own}
        groups = [group for key, group in found.get("groups", {}).items() if key not in children]
        roots += groups or found["tasks"].values()
        for key, task in found["tasks"].items():
            _check_task(task, key, field, generation)
    return Tasks(manager, roots)


def _check_task(task: Task, name: str, field: str, generation: bool) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        cure = "export the model, and let the harness run it: lm_eval --confirm_run_unsafe_code"
        raise UserError(f"{field}: {name} runs code that the model writes; {cure}")
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"{field}: {name} is about more than text; leave it out")
    if task.OUTPUT_TYPE == _GENERATES and not generation:
        cure = "score it afterwards: python -m dynmoe.evaluate RUN --tasks"
        raise UserError(f"{field}: {name} lets the model write, which takes too long while training; {cure} {name}")


@dataclass(frozen=True)
class TaskScores:
    """What tasks came to.

    Attributes:
        scores: figures of each task and group, by name, with experts per token.
        cut: requests of each task that lost their beginning.
        report: what the harness says, without the documents.
    """

    scores: dict[str, Scores]
    cut: dict[str, int]
    report: dict[str, Any]


def score_tasks(
    model: ScoredModel, tasks: Tasks, progress: Progress, *, shots: int | None = None, limit: int | None = None,
    bootstrap: int = 100_000,
) -> TaskScores:  # fmt: skip
    """Runs the harness; of a spread model every rank does, and the first of each host has the result.

    Args:
        model: the model.
        tasks: what it is scored on.
        progress: is told of each pass.
        shots: examples before each question; None: as each task says.
        limit: documents of each task; None: all.
        bootstrap: samples for standard errors that have no formula; 0: no standard errors at all.
    """
    harness = HarnessModel(model, progress)
    with _keeping_random_state(), _without_bars():
        report = simple_evaluate(
            harness, tasks=list(tasks.roots), task_manager=tasks.manager, num_fewshot=shots, limit=limit,
            bootstrap_iters=bootstrap, log_samples=False,
        )  # fmt: skip
    if report is None:
        return TaskScores({}, harness.cut, {})
    scores = {
        name: _figures(own) | harness.use.figures(_leaves(name, report["group_subtasks"]))
        for name, own in report["results"].items()
    }
    return TaskScores(scores, harness.cut, report)


def _figures(result: Mapping[str, Any]) -> Scores:
    """Figures of a task by name; the harness calls them ``acc,none`` and ``acc_stderr,none``."""
    figures = {}
    for key, value in result.items():
        metric, comma, filtered = key.partition(",")
        if comma and isinstance(value, (int, float)):
            error = "_stderr" if metric.endswith("_stderr") else ""
            name = metric.removesuffix("_stderr") + ("" if filtered == "none" else f".{filtered}")
            figures[name + error] = float(value)
    return figures


def _leaves(name: str, children: Mapping[str, Sequence[str]]) -> list[str]:
    """Tasks of a group, those of its groups included; a task itself."""
    return [leaf for child in children[name] for leaf in _leaves(child, children)] if children.get(name) else [name]


@contextmanager
def _keeping_random_state() -> Iterator[None]:
    """The harness seeds every generator of the process; a training goes on as if it had not."""
    ours, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_initialized() else []):
        try:
            yield
        finally:
            random.setstate(ours)
            np.random.set_state(numpy_state)


@contextmanager
def _without_bars() -> Iterator[None]:
    """The harness draws a bar for each task on every rank, whatever it is told; ours says the same."""
    bars = task_module.tqdm
    task_module.tqdm = lambda items, **options: items
    try:
        yield
    finally:
        task_module.tqdm = bars
