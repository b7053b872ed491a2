"""Engines: the only package that imports DeepSpeed or Megatron-Core, except for Megatron's datasets."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dynmoe.config import Config
    from dynmoe.train.engine import Engine


def make_engine(config: Config, vocab_size: int) -> Engine:
    """Creates the configured engine; only its package is imported.

    Args:
        config: configuration of the run.
        vocab_size: rows of the embedding.
    """
    if config.engine == "megatron":
        from dynmoe.engines.megatron.engine import MegatronEngine

        return MegatronEngine(config, vocab_size)
    from dynmoe.engines.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(config, vocab_size)
