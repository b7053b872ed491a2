"""Pretrains a model: torchrun --nproc-per-node 2 train.py configs/quickstart.yaml train.steps=1000"""

from __future__ import annotations

import argparse
import os
from functools import partial

from dynmoe.cli import run_tool
from dynmoe.config import Config, describe_fields, load_config
from dynmoe.launched import StopSignal, end_with_launcher


class _Parser(argparse.ArgumentParser):
    """Lists the fields of the configuration at the end of ``--help``."""

    def format_help(self) -> str:
        fields = (f"  {name:30} {text} ({kind}; default {default})" for name, kind, default, text in describe_fields())
        self.epilog = "\n".join(["fields:", *fields])
        return super().format_help()


def parse_arguments() -> tuple[Config, bool]:
    """Returns the merged configuration, and whether it is only to be printed."""
    parser = _Parser(
        "train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("config", nargs="?", help="YAML file; fields that it does not set keep their defaults")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="sets a field, such as model.router.p=0.5")
    parser.add_argument("--trace", action="store_true", help="write the routing of every step (docs/statistics.md)")
    parser.add_argument("--print-config", action="store_true", help="print the merged configuration and exit")
    given = parser.parse_intermixed_args()
    path = given.config
    overrides = given.overrides
    if path is not None and "=" in path:
        overrides = [path, *overrides]
        path = None
    if given.trace:
        overrides = ["logging.trace_interval=1", *overrides]
    return load_config(path, overrides), given.print_config


def train(config: Config, stop_signal: StopSignal) -> None:
    """Runs the training that a checked configuration describes."""
    # Heavy imports come late, so that a mistake in the configuration or the data is reported before them.
    from dynmoe.data.corpus import open_corpora

    corpora = open_corpora(config.data.dirs, config.data.sequence_length)
    rank = int(os.environ.get("RANK", "0"))
    is_alone = os.environ.get("WORLD_SIZE", "1") == "1"

    from dynmoe.evaluate.training import TrainingScores
    from dynmoe.train.run_directory import RunDirectory
    from dynmoe.train.verification import gather_ranks, verify_corpora

    scores = TrainingScores(config, corpora)
    directory = RunDirectory(config.run.path)
    if rank == 0:
        directory.claim()
    if is_alone:
        verify_corpora(corpora, config.data.verify, directory.verified)

    import torch.distributed as dist

    from dynmoe.data.batches import PretrainingData
    from dynmoe.engines import make_engine
    from dynmoe.ops.host_memory import keep_freed_memory
    from dynmoe.report.pictures import pictures_of_run
    from dynmoe.train.summary import conclude, describe_start
    from dynmoe.train.trainer import Trainer
    from dynmoe.train.views import make_views
    from dynmoe.train.watchdog import Watchdog

    keep_freed_memory()
    vocab_size = config.model.embedding_rows(corpora[0].tokenizer.vocab_size)
    with Watchdog(directory.hangs, config.guard.hang_timeout_s) as watchdog:
        engine = make_engine(config, vocab_size)
        start = describe_start(config, engine.device)
        if rank == 0:
            print(start)
        if not is_alone:  # the ranks share the work
            verify_corpora(corpora, config.data.verify, directory.verified, gather_ranks, rank, watchdog.progress)
        data = PretrainingData(corpora, config.data, config.train.seed, directory.data_index)
        views = partial(make_views, config, directory, pictures_of_run)
        score = partial(scores.row, engine, vocab_size, directory.data_index, watchdog.progress)
        trainer = Trainer(config, engine, data, directory, vocab_size, views, stop_signal, watchdog, score)
        result = trainer.run()
        conclude(config, engine, trainer.size, result, corpora, directory)
        # This may wait for other ranks, so it is skipped after a failure: the exit of this process is their signal.
        watchdog.progress("the end of the process groups")
        dist.destroy_process_group()


def main() -> None:
    end_with_launcher()
    config, print_only = parse_arguments()
    if print_only:
        print(config.to_yaml(), end="")
        return
    stop_signal = StopSignal()
    from dynmoe.launch.elastic import fit_running

    fit = fit_running(config, int(os.environ.get("WORLD_SIZE", "1")))
    if fit.misfit and os.environ.get("RANK", "0") == "0":
        print(f"train.micro_batch={fit.config.train.micro_batch} instead of {config.train.micro_batch}: {fit.misfit}")
    train(fit.config, stop_signal)


if __name__ == "__main__":
    run_tool(main)
