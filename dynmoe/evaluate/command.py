"""The command: evaluates a run's newest checkpoint."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynmoe.errors import UserError

if TYPE_CHECKING:
    from dynmoe.config import Config
    from dynmoe.data.corpus import Corpus
    from dynmoe.evaluate.harness import Tasks, TaskScores
    from dynmoe.evaluate.models import WholeModel
    from dynmoe.evaluate.scoring import Progress
    from dynmoe.train.metrics import Row
    from dynmoe.train.run_directory import RunDirectory

_DESCRIPTION = """Evaluates a run's newest checkpoint: loss and perplexity of each corpus, and tasks of
lm-evaluation-harness, each with the experts that its tokens used. Adds the scores to the run's metrics."""


def main() -> None:
    parser = argparse.ArgumentParser("python -m dynmoe.evaluate", description=_DESCRIPTION)
    parser.add_argument("run", type=Path, metavar="RUN", help="directory of a run of either engine")
    parser.add_argument(
        "--tasks", nargs="+", default=[], metavar="TASK",
        help="harness tasks, groups or tags, or YAML files, separated by spaces or commas",
    )  # fmt: skip
    parser.add_argument("--include", type=Path, metavar="DIR", help="folder of more YAML files with named tasks")
    parser.add_argument("--shots", type=int, help="examples before each question; default: as each task specifies")
    parser.add_argument("--limit", type=int, help="maximum number of documents per task; default: all")
    parser.add_argument(
        "--experts-per-token", nargs="+", type=float, metavar="K",
        help="evaluate with each of these budgets, in the range of model.router.budgets; the scores are not added to "
        "the run's metrics (python -m dynmoe.report budget draws them)",
    )  # fmt: skip
    domains = parser.add_mutually_exclusive_group()
    domains.add_argument("--corpora", nargs="+", metavar="DIR", help="corpora to use as domains; default: data.dirs")
    domains.add_argument("--no-domains", action="store_true", help="evaluate only tasks")
    parser.add_argument("--output", type=Path, help="JSON file for the scores, which are then not added to the run")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is a GPU")
    given = parser.parse_args()
    names = [name for given_name in given.tasks for name in given_name.split(",") if name]
    _check(given, names)

    from dynmoe.config import load_config
    from dynmoe.train.run_directory import RunDirectory

    directory = RunDirectory(given.run)
    config = load_config(directory.config)
    for wanted in given.experts_per_token or []:
        config.model.router.check_budget(wanted, "--experts-per-token")
    if given.output is None and not given.experts_per_token:
        _claim(directory)
        directory.release()  # evaluation may take long and must not block training
    corpora, sequences = ({}, None) if given.no_domains else _open_corpora(config, given.corpora)
    tasks = None
    if names:
        _check_installed()
        from dynmoe.evaluate.harness import open_tasks

        tasks = open_tasks(names, "--tasks", folder=given.include)

    _score(given, config, directory, corpora, sequences, tasks)


def _score(
    given: argparse.Namespace,
    config: Config,
    directory: RunDirectory,
    corpora: dict[str, Corpus],
    sequences: dict[str, int] | None,
    tasks: Tasks | None,
) -> None:
    """Computes, prints and stores the scores."""
    import torch

    from dynmoe.evaluate.models import WholeModel
    from dynmoe.train.console import print_scores
    from dynmoe.trained import open_trained

    trained = open_trained(given.run, None if given.device is None else torch.device(given.device))
    for name, corpus in corpora.items():
        if not corpus.tokenizer.encodes_like(trained.tokenizer):
            cure = f"prepare it with --tokenizer {directory.tokenizer}"
            raise UserError(f"--corpora: {name} was encoded with a different tokenizer than the run; {cure}")
    if tasks is not None:
        from dynmoe.evaluate.harness import rehearse

        rehearse(tasks, trained.tokenizer, config.data.sequence_length, given.limit, given.shots)
    model = WholeModel(trained)
    content: dict[str, Any] = {"run": config.run.name, "step": trained.step}
    path = directory.path / "evaluations" / f"step_{trained.step:08d}.json"
    if given.experts_per_token:
        content["budgets"] = []
        for wanted in given.experts_per_token:
            trained.decoder.context.aim(wanted)
            row, done = _score_once(given, model, corpora, sequences, tasks)
            print_scores(row, f"{given.run}, step {trained.step}, {wanted:g} experts per token")
            report = {} if done is None else {"cut": done.cut, "harness": done.report}
            content["budgets"].append({"experts_per_token": wanted, "scores": row, **report})
        _write(content, given.output or path.with_stem(f"{path.stem}_budgets"))
        return
    row, done = _score_once(given, model, corpora, sequences, tasks)
    print_scores(row, f"{given.run}, step {trained.step}")
    content["scores"] = row
    if done is not None:
        longest = config.data.sequence_length
        for name, count in done.cut.items():
            print(f"{name}: truncated {count} requests at the beginning to data.sequence_length ({longest})")
        content |= {"cut": done.cut, "harness": done.report}
    _write(content, given.output or path)
    if given.output is None:
        _record(config, directory, trained.step, row)


def _score_once(
    given: argparse.Namespace, model: WholeModel, corpora: dict[str, Corpus], sequences: dict[str, int] | None,
    tasks: Tasks | None,
) -> tuple[Row, TaskScores | None]:  # fmt: skip
    """The scores of domains and tasks as a row of metrics, and the results of the tasks."""
    from dynmoe.evaluate.domains import score_domains
    from dynmoe.train.scores import scores_row

    done = None
    with tempfile.TemporaryDirectory() as cache, _shown("domains") as progress:
        domains = score_domains(model, corpora, Path(cache), progress, sequences)
    if tasks is not None:
        from dynmoe.evaluate.harness import score_tasks

        with _shown("tasks") as progress:
            done = score_tasks(model, tasks, progress, shots=given.shots, limit=given.limit)
    return scores_row({} if done is None else done.scores, domains), done


def _check(given: argparse.Namespace, names: Sequence[str]) -> None:
    for name, least in {"limit": 1, "shots": 0}.items():
        value = getattr(given, name)
        if value is not None and not names:
            raise UserError(f"--{name}={value}: needs tasks; name some with --tasks, or omit it")
        if value is not None and value < least:
            raise UserError(f"--{name}={value}: is too small; use {least} or more")
    if given.no_domains and not names:
        raise UserError("--no-domains: nothing to evaluate; name --tasks, or omit it")
    if given.include is not None and not given.include.is_dir():
        raise UserError(f"--include={given.include}: is not a directory; use one with YAML files of tasks")
    folder = None if given.output is None else given.output.parent
    if folder is not None and not folder.is_dir():
        raise UserError(f"--output={given.output}: {folder} is not a directory; create it, or use another path")


def _check_installed() -> None:
    from importlib.util import find_spec

    if find_spec("lm_eval") is None:
        raise UserError("--tasks: lm-evaluation-harness is not installed; run pip install 'dynmoe[eval]'")


def _claim(directory: RunDirectory) -> None:
    try:
        directory.claim()
    except UserError as error:
        problem = str(error).split(": ", 1)[1].split(";")[0]
        raise UserError(f"{problem}; wait for it, or leave the run unchanged with --output FILE") from None


def _open_corpora(config: Config, given: Sequence[str] | None) -> tuple[dict[str, Corpus], dict[str, int] | None]:
    """Returns the corpora by domain, and for a run's own blend the number of sequences that its evaluations read."""
    from dynmoe.data.corpus import by_domain, open_corpora
    from dynmoe.data.validation import is_weighted, sequences_by_domain

    dirs = config.data.dirs if given is None else given
    try:
        corpora = open_corpora(dirs, config.data.sequence_length)
        own_blend = given is None and is_weighted(config, corpora)
        return by_domain(corpora), sequences_by_domain(config, corpora) if own_blend else None
    except UserError as error:
        raise UserError(f"{error}; or use other corpora with --corpora, or skip domains with --no-domains") from None


@contextmanager
def _shown(what: str) -> Iterator[Progress]:
    """Shows a progress bar on a terminal."""
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True), transient=True) as bar:
        line = bar.add_task(what, total=None)
        yield lambda done, of: bar.update(line, completed=done, total=of)


def _write(content: dict[str, Any], path: Path) -> None:
    from dynmoe.train.checkpoint import write_atomically

    try:
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, json.dumps(content, indent=1, default=str) + "\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); use another path with --output") from None
    print(f"Scores: {path}")


def _record(config: Config, directory: RunDirectory, step: int, row: Row) -> None:
    """Adds the scores to the run's metrics and their views."""
    from dynmoe.report.pictures import pictures_of_run
    from dynmoe.train.record import on_views
    from dynmoe.train.step_log import merge
    from dynmoe.train.views import make_views

    _claim(directory)
    try:
        merge(directory.metrics, "train/step", step, row)
        views, _ = make_views(config, directory, pictures_of_run, None, None)
        on_views(views, lambda view: view.log({"train/step": step, **row}, None))
        on_views(views, lambda view: view.close())
    finally:
        directory.release()
    print(f"Added to {directory.metrics}; python -m dynmoe.report {directory.path} shows them.")
