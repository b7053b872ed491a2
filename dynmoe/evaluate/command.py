"""The command: scores of a run's newest checkpoint."""

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
    from dynmoe.evaluate.harness import Tasks
    from dynmoe.evaluate.scoring import Progress
    from dynmoe.train.metrics import Row
    from dynmoe.train.run_directory import RunDirectory

_DESCRIPTION = """Scores a run's newest checkpoint: loss and perplexity of each corpus by itself, and tasks of
lm-evaluation-harness, each with the experts that its tokens used. The scores join the run's metrics."""


def main() -> None:
    parser = argparse.ArgumentParser("python -m dynmoe.evaluate", description=_DESCRIPTION)
    parser.add_argument("run", type=Path, metavar="RUN", help="directory of the run, of either engine")
    parser.add_argument(
        "--tasks", nargs="+", default=[], metavar="TASK",
        help="names of the harness (tasks, groups, tags), or YAML files; commas separate, too",
    )  # fmt: skip
    parser.add_argument("--include", type=Path, metavar="DIR", help="more YAML files, whose tasks go by their names")
    parser.add_argument("--shots", type=int, help="examples before each question; default: as each task says")
    parser.add_argument("--limit", type=int, help="documents of each task at most; default: all")
    domains = parser.add_mutually_exclusive_group()
    domains.add_argument("--corpora", nargs="+", metavar="DIR", help="of the domains; default: data.dirs of the run")
    domains.add_argument("--no-domains", action="store_true", help="tasks alone")
    parser.add_argument("--output", type=Path, help="a JSON file for the scores, which then leave the run as it is")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU where there is one")
    given = parser.parse_args()
    names = [name for given_name in given.tasks for name in given_name.split(",") if name]
    _check(given, names)

    from dynmoe.config import load_config
    from dynmoe.train.run_directory import RunDirectory

    directory = RunDirectory(given.run)
    config = load_config(directory.config)
    if given.output is None:
        _claim(directory)
        directory.release()  # scoring may take long, and a training comes first
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
    """Scores, shows and keeps."""
    import torch

    from dynmoe.evaluate.domains import score_domains
    from dynmoe.evaluate.models import WholeModel
    from dynmoe.train.console import print_scores
    from dynmoe.train.scores import scores_row
    from dynmoe.trained import open_trained

    trained = open_trained(given.run, None if given.device is None else torch.device(given.device))
    for name, corpus in corpora.items():
        if corpus.tokenizer.sha256 != trained.tokenizer.sha256:
            cure = f"prepare it with --tokenizer {directory.tokenizer}"
            raise UserError(f"--corpora: {name} is encoded by another tokenizer than the run's; {cure}")
    model, done = WholeModel(trained), None
    with tempfile.TemporaryDirectory() as cache, _shown("domains") as progress:
        domains = score_domains(model, corpora, Path(cache), progress, sequences)
    if tasks is not None:
        from dynmoe.evaluate.harness import score_tasks

        with _shown("tasks") as progress:
            done = score_tasks(model, tasks, progress, shots=given.shots, limit=given.limit)
    row = scores_row({} if done is None else done.scores, domains)
    print_scores(row, f"{given.run}, step {trained.step}")
    content: dict[str, Any] = {"run": config.run.name, "step": trained.step, "scores": row}
    if done is not None:
        longest = config.data.sequence_length
        for name, count in done.cut.items():
            print(f"{name}: {count} requests are longer than data.sequence_length ({longest}) and lost their beginning")
        content |= {"cut": done.cut, "harness": done.report}
    _write(content, given.output or directory.path / "evaluations" / f"step_{trained.step:08d}.json")
    if given.output is None:
        _record(config, directory, trained.step, row)


def _check(given: argparse.Namespace, names: Sequence[str]) -> None:
    for name, least in {"limit": 1, "shots": 0}.items():
        value = getattr(given, name)
        if value is not None and not names:
            raise UserError(f"--{name}={value}: there are no tasks; name some by --tasks, or leave it out")
        if value is not None and value < least:
            raise UserError(f"--{name}={value}: is too small; use {least} or more")
    if given.no_domains and not names:
        raise UserError("--no-domains: nothing is left to score; name --tasks, or leave it out")
    if given.include is not None and not given.include.is_dir():
        raise UserError(f"--include={given.include}: is no directory; name one with YAML files of tasks")
    folder = None if given.output is None else given.output.parent
    if folder is not None and not folder.is_dir():
        raise UserError(f"--output={given.output}: {folder} is no directory; make it, or name another file")


def _check_installed() -> None:
    from importlib.util import find_spec

    if find_spec("lm_eval") is None:
        raise UserError("--tasks: lm-evaluation-harness is not here; pip install 'dynmoe[eval]'")


def _claim(directory: RunDirectory) -> None:
    try:
        directory.claim()
    except UserError as error:
        problem = str(error).split(": ", 1)[1].split(";")[0]
        raise UserError(f"{problem}; wait for it, or leave the run as it is: --output FILE") from None


def _open_corpora(config: Config, given: Sequence[str] | None) -> tuple[dict[str, Corpus], dict[str, int] | None]:
    """The corpora by the names of their domains; and for a run's own blend the sequences that its evaluations read."""
    from dynmoe.data.corpus import by_domain, open_corpora
    from dynmoe.data.validation import is_weighted, sequences_by_domain

    dirs = config.data.dirs if given is None else given
    try:
        corpora = open_corpora(dirs, config.data.sequence_length)
        own_blend = given is None and is_weighted(config, corpora)
        return by_domain(corpora), sequences_by_domain(config, corpora) if own_blend else None
    except UserError as error:
        raise UserError(f"{error}; or name others by --corpora, or leave domains out by --no-domains") from None


@contextmanager
def _shown(what: str) -> Iterator[Progress]:
    """A bar on a terminal."""
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
        raise UserError(f"{path} cannot be written ({error.strerror}); name another file by --output") from None
    print(f"Scores: {path}")


def _record(config: Config, directory: RunDirectory, step: int, row: Row) -> None:
    """Puts the scores into the run's metrics and their views."""
    from dynmoe.report.pictures import pictures_of_run
    from dynmoe.train.record import on_views
    from dynmoe.train.step_log import merge
    from dynmoe.train.views import make_views

    _claim(directory)
    try:
        merge(directory.metrics, "train/step", step, row)
        views, _ = make_views(config, directory, pictures_of_run, None, step)
        on_views(views, lambda view: view.log({"train/step": step, **row}, None))
        on_views(views, lambda view: view.close())
    finally:
        directory.release()
    print(f"They are in {directory.metrics}; python -m dynmoe.report {directory.path} shows them.")
