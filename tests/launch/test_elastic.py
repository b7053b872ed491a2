"""Starts on other numbers of ranks: the search against an oracle, and which starts may adapt."""

from __future__ import annotations

import dataclasses
import json
from itertools import product

import pytest

from dynmoe.config import Config, load_config
from dynmoe.config.logging import LoggingConfig
from dynmoe.errors import ConfigError, UserError
from dynmoe.launch.elastic import Fit, fit_running, fit_start, largest_fit, read_saved
from dynmoe.launch.starts import begin
from dynmoe.train.accounting import Progress
from dynmoe.train.checkpoint import TRAINER, commit, hashes
from dynmoe.train.run_directory import RunDirectory
from tests.launch.cases import train_on
from tests.train.cases import read_rows, tiny

MOST_RANKS = 9
MODEL = ["model.layers=4", "model.hidden=32", "model.heads=4", "model.kv_heads=2", "model.moe.experts=4",
         "model.moe.expert_hidden=32", "data.sequence_length=32"]  # fmt: skip
SIZES = {
    "deepspeed": [{"expert": expert} for expert in (1, 2, 4)],
    "megatron": [
        {"expert": expert, "tensor": tensor, "pipeline": pipeline, "virtual_pipeline": chunks, "context": context}
        for expert, tensor, pipeline, chunks, context in product((1, 2), (1, 2), (1, 2), (1, 2), (1, 2))
        if pipeline > 1 or chunks == 1
    ],
}


def can_train(config: Config, ranks: int, micro_batch: int) -> bool:
    """Places ranks on a grid and deals the sequences of a step, one micro-batch to each group after the other."""
    parallel = config.parallel
    stages: dict[int, list[int]] = {}
    for rank in range(ranks):  # rank = (stage, data, tensor and context)
        stages.setdefault(rank * parallel.pipeline // ranks, []).append(rank)
    sizes = {len(stage) for stage in stages.values()}
    if len(stages) != parallel.pipeline or len(sizes) != 1:
        return False
    per_stage = sizes.pop()
    for size in (parallel.expert, parallel.tensor * parallel.context):
        groups = [range(per_stage)[start : start + size] for start in range(0, per_stage, size)]
        if any(len(group) != size for group in groups):
            return False
    readers = per_stage // (parallel.tensor * parallel.context)
    left = config.train.global_batch
    passes = 0
    while left > 0:
        left -= readers * micro_batch
        passes += 1
    return left == 0 and (parallel.virtual_pipeline == 1 or passes % parallel.pipeline == 0)


def oracle(config: Config, available: int) -> tuple[int, int] | None:
    """The most ranks, then the largest micro-batch."""
    found = [
        (ranks, rows)
        for ranks in range(1, available + 1)
        for rows in range(1, config.train.micro_batch + 1)
        if can_train(config, ranks, rows)
    ]
    return max(found, default=None)


@pytest.mark.parametrize("engine", ["deepspeed", "megatron"])
def test_the_search_agrees_with_trying_everything(engine):
    base = load_config(None, [*MODEL, f"engine={engine}"])
    found = set()
    for sizes, batch, rows in product(SIZES[engine], (1, 2, 3, 4, 6, 8, 12), (1, 2, 3, 4)):
        config = dataclasses.replace(
            base,
            parallel=dataclasses.replace(base.parallel, **sizes),
            train=dataclasses.replace(base.train, global_batch=batch, micro_batch=rows),
        )
        for ranks in range(1, MOST_RANKS):
            best = oracle(config, ranks)
            found.add(best)
            if best is None:
                with pytest.raises(ConfigError):
                    largest_fit(config, ranks)
                continue
            fit = largest_fit(config, ranks)
            assert (fit.ranks, fit.config.train.micro_batch, fit.available) == (*best, ranks), (sizes, batch, rows)
            assert dataclasses.replace(fit.config, train=config.train) == config, "only the micro-batch changes"
            if can_train(config, ranks, rows):
                assert fit == Fit(config, ranks, ranks), "what fits stays"
    assert None in found
    assert len(found) > 10


@pytest.mark.parametrize("engine", ["deepspeed", "megatron"])
def test_the_fewest_ranks_are_the_first_that_can_train(engine):
    base = load_config(None, [*MODEL, f"engine={engine}", "train.global_batch=64"])
    for sizes in SIZES[engine]:
        config = dataclasses.replace(base, parallel=dataclasses.replace(base.parallel, **sizes))
        first = next(ranks for ranks in range(1, MOST_RANKS) if can_train(config, ranks, 1))
        assert config.parallel.fewest_ranks == first, sizes
        assert config.training_command == f"torchrun --nproc-per-node {first} train.py runs/default/config.yaml"


def test_many_ranks_are_searched_at_once():
    """Of 4,095 ranks, 4,094 cannot share 4,096 sequences evenly."""
    config = load_config(None, [*MODEL, "train.global_batch=4096", "train.micro_batch=64"])
    fit = largest_fit(config, 4095)
    assert (fit.ranks, fit.config.train.micro_batch) == (2048, 2)


@pytest.fixture
def fields(corpus_dir, tmp_path) -> list[str]:
    return tiny(corpus_dir, tmp_path / "runs")


def save(fields: list[str], step: int = 10, samples: int = 40, ranks: int = 4) -> RunDirectory:
    """Adds a checkpoint to the run; returns the run's directory."""
    config = load_config(None, fields)
    directory = RunDirectory(config.run.path)
    building = directory.checkpoints / "building"
    building.mkdir(parents=True)
    progress = dataclasses.asdict(Progress(step=step, samples=samples))
    state = {"progress": progress, "config": dataclasses.asdict(config), "data": []}
    (building / TRAINER).write_text(json.dumps(state))
    manifest = {"step": step, "ranks": ranks, "files": hashes([building / TRAINER], building)}
    commit(building, directory.checkpoints / f"step_{step:08d}", manifest)
    return directory


def test_a_first_start_with_a_mistake_is_an_error(fields):
    config = load_config(None, fields)
    cure = r"start a multiple of 2 ranks, or use a divisor"
    with pytest.raises(ConfigError, match=rf"parallel\.expert=2: must divide the world size \(3\); {cure}"):
        fit_start(config, 3)
    save(fields, samples=0)  # made by a tool, and not trained
    with pytest.raises(ConfigError, match="must divide the world size"):
        fit_start(config, 3)


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["parallel.elastic=never"], r"parallel\.expert=2: must divide the world size \(3\)"),
        (["train.global_batch=7"], r"parallel\.expert=2: must divide the world size \(3\)"),
        (["parallel.expert=4"], r"parallel\.expert=4: must divide the world size \(3\)"),
    ],
)
def test_a_run_that_continues_with_a_mistake_is_an_error(fields, overrides, problem):
    save(fields)
    with pytest.raises(ConfigError, match=problem):
        fit_start(load_config(None, [*fields, *overrides]), 3)


def test_a_run_that_continues_adapts_as_little_as_it_can(fields):
    save(fields)
    config = load_config(None, fields)
    assert fit_start(config, 2) == Fit(config, 2, 2)
    fit = fit_start(config, 3)
    assert fit == Fit(config, 2, 3, "parallel.expert=2: must divide the world size (3)")
    fit = fit_start(config, 4)
    assert (fit.ranks, fit.config.train.micro_batch, fit.config.train.global_batch) == (4, 1, 4)
    assert fit.misfit == "train.global_batch=4: cannot be split evenly over ranks"
    assert fit_start(config, 100).ranks == 4
    assert fit_start(load_config(None, [*fields, "train.micro_batch=3"]), 2).config.train.micro_batch == 2


def test_always_also_adapts_a_first_start(fields):
    fit = fit_start(load_config(None, [*fields, "parallel.elastic=always"]), 3)
    assert fit.ranks == 2
    assert fit.describe(None).startswith("starts on 2 of 3 rank(s): a step has 1 micro-batch(es) of 2, as parallel.exp")


def test_experts_are_not_moved_to_fewer_ranks_by_themselves(fields):
    save(fields)
    config = load_config(None, fields)
    with pytest.raises(
        ConfigError, match=r"parallel\.expert=2: the parallel sizes need at least 2 ranks, and there are 1; "
        r"start more, or set parallel\.expert=1 if a rank can hold 2 x the experts",
    ):  # fmt: skip
        fit_start(config, 1)
    assert fit_start(load_config(None, [*fields, "parallel.expert=1"]), 1).ranks == 1
    save([*fields, "parallel.expert=4"], 20)
    assert fit_start(config, 3).ranks == 2, "the cure works on any number of ranks"


def test_too_few_ranks_for_the_other_sizes_are_an_error():
    config = load_config(None, [*MODEL, "engine=megatron", "parallel.tensor=2", "parallel.pipeline=4"])
    with pytest.raises(ConfigError, match=r"parallel\.pipeline=4: the parallel sizes need at least 8 ranks, and there"):
        largest_fit(config, 7)
    config = load_config(None, [*MODEL, "parallel.expert=2", "train.global_batch=3"])
    with pytest.raises(
        ConfigError, match=r"train\.global_batch=3: cannot be split evenly over ranks; use a multiple of"
    ):
        largest_fit(config, 7)


def test_what_no_number_of_ranks_mends_is_said(fields, monkeypatch):
    save(fields)
    error = ConfigError("logging.wandb", "online", "needs wandb", "install it")
    monkeypatch.setattr(LoggingConfig, "check_installed", lambda self: (_ for _ in ()).throw(error))
    with pytest.raises(ConfigError, match=r"logging\.wandb='online': needs wandb; install it"):
        fit_start(load_config(None, fields), 2)


def test_ranks_that_run_already_cannot_stay_idle(fields):
    save(fields)
    config = load_config(None, fields)
    assert fit_running(config, 4).config.train.micro_batch == 1
    with pytest.raises(UserError, match=r"must divide the world size \(3\); start 2 of the 3 ranks, as the scripts"):
        fit_running(config, 3)


def test_the_checkpoint_is_the_latest_intact_one(fields):
    directory = save(fields, 10, ranks=2)
    save([*fields, "train.global_batch=8"], 20, ranks=4)
    assert read_saved(directory).config["train"]["global_batch"] == 8
    damaged = directory.checkpoints / "step_00000020" / TRAINER
    damaged.write_text(damaged.read_text().replace("loss_free", "loss_fred"))
    saved = read_saved(directory)
    assert (saved.ranks, saved.config["train"]["global_batch"]) == (2, 4)


def test_older_runs_lack_some_sizes(fields):
    directory = save(fields)
    trainer = directory.checkpoints / "step_00000010" / TRAINER
    state = json.loads(trainer.read_text())
    for name in ("elastic", "context"):
        del state["config"]["parallel"][name]
    trainer.write_text(json.dumps(state))
    manifest = {"step": 10, "ranks": 4, "files": hashes([trainer], trainer.parent)}
    commit(trainer.parent, directory.checkpoints / "step_00000010", manifest)
    assert fit_start(load_config(None, fields), 4).ranks == 4


def test_a_start_records_the_ranks_in_use_and_tells_of_changes(fields):
    config = load_config(None, fields)
    first = begin(config, 2, 0)
    assert (first.ranks, first.change) == (2, "")
    save(fields, ranks=2)
    assert begin(config, 2, 0).change == ""
    assert begin(config, 3, 0).change.startswith("continues on 2 of 3 rank(s): a step has 1 micro-batch(es) of 2, as ")
    more = begin(config, 4, 0)
    assert more.change == (
        "continues on 4 rank(s) (before: 2): a step has 1 micro-batch(es) of 1, as train.global_batch=4: cannot be "
        "split evenly over ranks"
    )
    alone = load_config(None, [*fields, "parallel.expert=1"])
    assert begin(alone, 1, 0).change == "continues on 1 rank(s) (before: 2): a step has 2 micro-batch(es) of 2"
    assert [row["ranks"] for row in read_rows(first.directory.starts(0))] == [2, 2, 2, 4, 1]


@pytest.mark.parametrize(
    "layout",
    [
        ["parallel.expert=2", "deepspeed.zero_stage=2"],
        pytest.param(["engine=megatron", "parallel.expert=2"], marks=pytest.mark.slow),
        ["engine=megatron", "parallel.pipeline=2", "train.micro_batch=2"],
    ],
)
def test_f29_losses_and_samples_are_those_of_an_uninterrupted_run(
    two_ranks, four_ranks, corpus_dir, tmp_path, layout
):  # fmt: skip
    """Two ranks, four of five, two of three, and two again: with one, two or four micro-batches per step."""
    fields = [f"data.dirs=[{corpus_dir}]", "data.documents=masked", "train.micro_batch=4", *layout,
              "model.router.kind=top_p", "model.router.balance_scope=sequence"]  # fmt: skip
    cache = tmp_path / "index"
    whole = two_ranks.run(train_on, fields, 2, (0, 12), "", str(tmp_path / "whole"), cache)
    losses = []
    load = ""
    for start, (pool, available) in enumerate([(two_ranks, 2), (four_ranks, 5), (two_ranks, 3), (four_ranks, 4)]):
        steps = (3 * start, 3 * start + 3)
        save = str(tmp_path / f"start_{start}")
        ranks = pool.run(train_on, fields, available, steps, load, save, cache)
        load = save
        losses += ranks[0][0]
        for step in range(*steps):
            read = sorted({number for _, numbers in ranks for number in numbers[step - steps[0]]})
            assert read == [*range(8 * step, 8 * step + 8)]
            assert sum(len(numbers[step - steps[0]]) for _, numbers in ranks) == 8 * copies(layout)
    assert losses == pytest.approx(whole[0][0], rel=1e-5)


def copies(layout: list[str]) -> int:
    """Number of ranks that read each sample."""
    return 2 if "parallel.pipeline=2" in layout else 1
