"""Functions that the ranks of a pool run."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from dynmoe.data.batches import PretrainingData
from dynmoe.data.corpus import open_corpora
from dynmoe.data.loader import Loader
from dynmoe.engines import make_engine
from dynmoe.launch.elastic import largest_fit
from dynmoe.train.engine import take_step
from tests.engines.cases import config_for, save_state

VOCAB = 448


def train_on(
    overrides: list[str], available: int, steps: tuple[int, int], load: str, save: str, cache: Path
) -> tuple[list[float], list[list[int]]]:
    """Trains some steps on all ranks of the pool, which ``available`` ranks were reduced to.

    Returns the loss, and the sample numbers of this rank, for each step.
    """
    fit = largest_fit(config_for(*overrides), available)
    assert fit.ranks == dist.get_world_size()
    config = fit.config
    engine = make_engine(config, VOCAB)
    if load:
        engine.load(Path(load))
    data = PretrainingData(open_corpora(config.data.dirs, config.data.sequence_length), config.data, 0, cache)
    loader = Loader(data, config.train, engine.data_rank, engine.data_size, pin=False)
    losses = []
    numbers = []
    for step in range(*steps):
        engine.step = step
        samples, batches = loader.take(step * config.train.global_batch, continues=step + 1 < steps[1])
        gradients, _ = take_step(engine, batches, config.optimizer.lr, record=True)
        losses.append(gradients.lm_loss)
        numbers.append([number for part in samples for number in part])
    loader.close()
    save_state(engine, save)
    return losses, numbers
