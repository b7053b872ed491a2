"""Search for layouts that fit, best first."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from dynmoe.config import Config
from dynmoe.errors import ConfigError
from dynmoe.plan.layout import Layout
from dynmoe.plan.memory import Memory, memory_per_rank
from dynmoe.plan.speed import Hardware, Speed, estimate

# Fraction of GPU memory; the rest is for libraries and fragmentation.
USABLE = 0.9


@dataclass(frozen=True)
class Plan:
    """A layout with its speed and its memory at the expected and at the maximum number of experts per token."""

    layout: Layout
    expected: Memory
    largest: Memory
    speed: Speed

    def fits(self, hardware: Hardware) -> bool:
        """Whether the largest memory fits, with a tenth in reserve."""
        return self.largest.total <= USABLE * hardware.memory_gib * 2**30


def most_experts(config: Config) -> float:
    """Experts per token at which memory is largest: the configured limit, or what the router can select."""
    model = config.model
    if not model.moe_layers:
        return 0.0
    most = model.router.max_experts_per_token(model.max_experts_per_layer)
    return float(min(most, model.moe.max_mean_experts_per_token or most))


def expected_experts(config: Config) -> float | None:
    """Mean number of experts per token, if the configuration determines it."""
    if not config.model.moe_layers:
        return 0.0
    expected = config.model.router.expected_experts
    return config.budget.experts_per_token if expected is None else float(expected)


def plan(layout: Layout, experts_per_token: float, hardware: Hardware, device: str = "cuda") -> Plan:
    most = max(most_experts(layout.config), experts_per_token)
    return Plan(
        layout,
        memory_per_rank(layout, experts_per_token, device),
        memory_per_rank(layout, most, device),
        estimate(layout, experts_per_token, hardware),
    )


def alternatives(layout: Layout, experts_per_token: float, hardware: Hardware) -> list[Plan]:
    """Plans that fit for the same training with other parallel sizes, micro-batches and recomputation, fastest first.

    Of layouts that differ only in the micro-batch, the best is returned. Among equally fast layouts, the best has the
    fewest micro-batches per step, then the least memory.

    Raises:
        ConfigError: the configuration fits this number of GPUs with no parallel sizes.
    """
    refused: list[ConfigError] = []
    plans = [plan(other, experts_per_token, hardware) for other in _variants(layout, refused)]
    if not plans:
        raise refused[0]
    plans = sorted((one for one in plans if one.fits(hardware)), key=_order)
    best: dict[tuple[object, ...], Plan] = {}
    for one in plans:
        config = one.layout.config
        sizes = dataclasses.astuple(config.parallel)
        best.setdefault((*sizes, config.train.recompute, config.deepspeed.zero_stage), one)
    return list(best.values())


def _order(one: Plan) -> tuple[float, int, float]:
    """Sort key that treats estimates within 1 % as equal."""
    return -round(math.log(one.speed.tokens_per_s), 2), one.layout.accumulation, one.expected.total


def _variants(layout: Layout, refused: list[ConfigError]) -> Iterator[Layout]:
    """The layouts that are valid; ``refused`` gets the errors of the others."""
    config = layout.config
    world = layout.world_size
    powers = [2**power for power in range(11) if 2**power <= world]
    per_node = [size for size in powers if size <= layout.ranks_per_node]
    megatron = config.engine == "megatron"
    own = config.parallel
    micro_batches = [2**power for power in range(config.train.global_batch.bit_length())]
    for expert, tensor, pipeline, micro_batch, recompute, stage in product(
        sorted({*powers, own.expert}),
        sorted({*per_node, own.tensor}) if megatron else [1],
        sorted({*powers, own.pipeline}) if megatron else [1],
        sorted({*micro_batches, config.train.micro_batch}),
        ("none", "full"),  # selective saves little, because attention stores no scores
        [0] if megatron else (0, 1, 2, 3),
    ):
        given = copy.deepcopy(config)
        given.parallel.expert = expert
        given.parallel.tensor = tensor
        given.parallel.pipeline = pipeline
        given.parallel.virtual_pipeline = 1
        given.train.micro_batch = micro_batch
        given.train.recompute = recompute
        given.deepspeed.zero_stage = config.deepspeed.zero_stage if megatron else stage
        try:
            given.__post_init__()
            given.check_world(world)
        except ConfigError as error:
            refused.append(error)
            continue
        yield Layout(given, layout.nodes, layout.ranks_per_node, layout.vocab_size)
