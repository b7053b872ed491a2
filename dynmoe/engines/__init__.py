"""Engines: the only package that imports DeepSpeed or Megatron-Core, except for Megatron's datasets."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from dynmoe.config import Config
    from dynmoe.train.engine import Engine


def engine_class(config: Config) -> Callable[[Config, int], Engine]:
    """The configured engine; only its package is imported."""
    if config.engine == "megatron":
        from dynmoe.engines.megatron.engine import MegatronEngine

        return MegatronEngine
    from dynmoe.engines.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine


def make_engine(config: Config, vocab_size: int) -> Engine:
    """Creates the configured engine.

    Args:
        config: configuration of the run.
        vocab_size: rows of the embedding.
    """
    return engine_class(config)(config, vocab_size)
