"""Starts on other numbers of ranks: batch, samples and schedule stay, and the number of micro-batches adapts.

Only ``train.micro_batch`` becomes smaller, so a forward pass needs no more memory. Ranks that the layout cannot use
stay idle. Parallel sizes never change by themselves: a smaller ``parallel.expert`` puts more experts on each rank.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dynmoe.config import Config
from dynmoe.config.parallel import ParallelConfig
from dynmoe.errors import ConfigError, UserError
from dynmoe.train.checkpoint import TRAINER, Checkpoint, find_corrupt_file, read_manifest, step_directories, step_of
from dynmoe.train.run_directory import RunDirectory


@dataclass(frozen=True)
class Saved:
    """The latest checkpoint of a run that has trained: number of ranks that saved it, and configuration."""

    ranks: int
    config: dict[str, Any]


@dataclass(frozen=True)
class Fit:
    """How a start uses its ranks.

    Attributes:
        config: configuration of the start; ``train.micro_batch`` may be smaller than the given one.
        ranks: number of ranks in use.
        available: number of ranks that there are.
        misfit: why the given configuration does not fit them; '' if it does.
    """

    config: Config
    ranks: int
    available: int
    misfit: str = ""

    def describe(self, saved: Saved | None) -> str:
        """One line for the user about a start from this checkpoint."""
        verb = "starts" if saved is None else "continues"
        of = f" of {self.available}" if self.ranks < self.available else ""
        before = f" (before: {saved.ranks})" if saved is not None and saved.ranks != self.ranks else ""
        passes = self.config.accumulation(self.ranks)
        reason = f", as {self.misfit}" if self.misfit else ""
        return (
            f"{verb} on {self.ranks}{of} rank(s){before}: a step has {passes} micro-batch(es) of "
            f"{self.config.train.micro_batch}{reason}"
        )


def fit_start(config: Config, ranks: int) -> Fit:
    """The fit of a start on ``ranks`` ranks, adapted if it has to be and ``parallel.elastic`` allows it.

    Raises:
        ConfigError: the configuration does not fit, and the start must not or cannot adapt.
    """
    try:
        config.check_world(ranks)
    except ConfigError as error:
        if not _may_adapt(config):
            raise
        return dataclasses.replace(largest_fit(config, ranks), misfit=error.fact)
    return Fit(config, ranks, ranks)


def fit_running(config: Config, ranks: int) -> Fit:
    """The fit of ranks that run already, so that none can stay idle.

    Raises:
        UserError: not all of them can be used; or as for :func:`fit_start`.
    """
    fit = fit_start(config, ranks)
    if fit.ranks < ranks:
        raise UserError(f"{fit.misfit}; start {fit.ranks} of the {ranks} ranks, as the scripts in launch/ do")
    return fit


def largest_fit(config: Config, ranks: int) -> Fit:
    """The most of ``ranks`` ranks that can train, with the largest ``train.micro_batch`` up to the given one.

    Raises:
        ConfigError: the parallel sizes need more ranks, or the configuration fits no number of them.
    """
    needed = math.lcm(config.parallel.model_parallel, config.parallel.pipeline * config.parallel.expert)
    if ranks < needed:
        raise _too_few(config, ranks, needed)
    fit = _search(config, ranks)
    if fit is None:
        config.check_world(needed)  # which says what does not fit
    assert fit is not None, "any fit of these ranks is found"
    return fit


def read_saved(directory: RunDirectory) -> Saved | None:
    """The latest checkpoint whose state is intact; None if the run has not trained. Other files are not verified.

    Raises:
        OSError: this host cannot read a checkpoint.
    """
    for path in step_directories(directory.checkpoints):
        manifest = read_manifest(path)
        if manifest is not None and find_corrupt_file(path, {TRAINER: manifest["files"][TRAINER]}) is None:
            state = Checkpoint(path, step_of(path)).trainer_state
            return Saved(manifest["ranks"], state["config"]) if state["progress"]["samples"] else None
    return None


def _may_adapt(config: Config) -> bool:
    """Whether ``parallel.elastic`` lets a start adapt.

    A run that continues has the global batch and the parallel sizes of its checkpoint. After a change of these, a
    misfit is a mistake and not a lost node. ``parallel.expert`` may become a divisor, as for fewer ranks.
    """
    if config.parallel.elastic != "resume":
        return config.parallel.elastic == "always"
    try:
        saved = read_saved(RunDirectory(config.run.path))
    except OSError as error:
        raise UserError(f"{error}; make it readable, or set parallel.elastic=always") from None
    if saved is None:
        return False
    before = _sizes(saved.config["parallel"])
    now = _sizes(dataclasses.asdict(config.parallel))
    fewer_ranks_share_experts = before.pop("expert") % now.pop("expert") == 0
    same_batch = saved.config["train"]["global_batch"] == config.train.global_batch
    return before == now and fewer_ranks_share_experts and same_batch


def _sizes(parallel: Mapping[str, Any]) -> dict[str, int]:
    """Parallel sizes by name; runs from before a size have its default."""
    fields = dataclasses.asdict(ParallelConfig()) | dict(parallel)
    return {name: size for name, size in fields.items() if name != "elastic"}


def _search(config: Config, ranks: int) -> Fit | None:
    for used in range(ranks, 0, -1):
        for candidate in _with_smaller_micro_batches(config, used):
            try:
                candidate.check_world(used)
            except ConfigError:
                continue
            return Fit(candidate, used, ranks)
    return None


def _with_smaller_micro_batches(config: Config, ranks: int) -> Iterator[Config]:
    """The configuration with each micro-batch, from the given one down, that divides the sequences of a rank."""
    groups = config.data_parallel(ranks)
    if groups == 0 or config.train.global_batch % groups:
        return
    sequences = config.train.global_batch // groups
    for rows in range(min(config.train.micro_batch, sequences), 0, -1):
        if sequences % rows == 0:
            yield dataclasses.replace(config, train=dataclasses.replace(config.train, micro_batch=rows))


def _too_few(config: Config, ranks: int, needed: int) -> ConfigError:
    """The error for fewer ranks than the ``needed`` ones; names the largest expert-parallel size that would fit."""
    parallel = config.parallel
    problem = f"the parallel sizes need at least {needed} ranks, and there are {ranks}"
    for expert in range(parallel.expert - 1, 0, -1):
        if parallel.expert % expert == 0:
            smaller = dataclasses.replace(config, parallel=dataclasses.replace(parallel, expert=expert))
            if _search(smaller, ranks) is not None:
                more = parallel.expert // expert
                cure = f"start more, or set parallel.expert={expert} if a rank can hold {more} x the experts"
                return ConfigError("parallel.expert", parallel.expert, problem, cure)
    name = max(("tensor", "pipeline", "context", "expert"), key=lambda name: getattr(parallel, name))
    return ConfigError(f"parallel.{name}", getattr(parallel, name), problem, "start more, or reduce it")
