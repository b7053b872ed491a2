"""Conversion of Megatron checkpoints to and from the canonical state, in one process that holds the whole model."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from dynmoe.config import Config
from dynmoe.engines import canonical_state
from dynmoe.engines.megatron.checkpoint import read_vocab_size
from dynmoe.engines.megatron.engine import MegatronEngine
from dynmoe.engines.megatron.weights import Weight, weights


def to_canonical(config: Config, source: Path, target: Path) -> None:
    """Writes the state of a Megatron checkpoint in canonical names and layout.

    Args:
        config: configuration of the run, with every parallel size set to 1.
        source: checkpoint directory to read.
        target: directory to write to.
    """
    engine = MegatronEngine(config, read_vocab_size(source))
    engine.load(source)
    write_canonical(engine, target)


def from_canonical(config: Config, source: Path, target: Path) -> None:
    """Writes a Megatron checkpoint from canonical state; the inverse of :func:`to_canonical`."""
    engine = MegatronEngine(config, canonical_state.read_shape(source, "w_embed_VD")[0])
    engine.set_step(canonical_state.load(source, _entries(engine), _buffers(engine)))
    snapshot = engine.snapshot(target)
    snapshot.write()
    snapshot.finish()


def write_canonical(engine: MegatronEngine, target: Path) -> None:
    """Writes the state of an engine in canonical names and layout into the directory ``target``."""
    canonical_state.copy(target, _entries(engine), _buffers(engine), engine.updates)()


def _entries(engine: MegatronEngine) -> list[canonical_state.Entry]:
    ranges = canonical_state.expert_ranges(engine.layers)
    return [_entry(weight, engine, ranges) for model in engine.models for weight in weights(model, engine.config.model)]


def _entry(weight: Weight, engine: MegatronEngine, ranges: dict[int, tuple[range, int]]) -> canonical_state.Entry:
    def get() -> dict[str, Tensor]:
        parts, _ = engine.state.shard(weight.parameter)
        return {part: weight.layout.join([flat.view(weight.parameter.shape)]) for part, flat in parts.items()}

    def put(values: dict[str, Tensor]) -> None:
        engine.state.set(weight.parameter, {part: weight.layout.split(whole, 1)[0] for part, whole in values.items()})

    moments = engine.state.moments(weight.parameter)
    return canonical_state.entry(
        weight.name, weight.parameter, tuple(weight.parameter.shape), ranges, moments, get, put
    )


def _buffers(engine: MegatronEngine) -> dict[str, Tensor]:
    """Router buffers by canonical name."""
    return {
        f"layers.{layer.layer}.moe.{name}": buffer for layer in engine.layers for name, buffer in layer.named_buffers()
    }
