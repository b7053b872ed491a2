"""Bytes over each kind of link and the time of a step, from given peaks and bandwidths: to compare layouts by."""

from __future__ import annotations

from dataclasses import dataclass

from dynmoe.plan.layout import Layout
from dynmoe.plan.memory import ranks_per_token


@dataclass(frozen=True)
class Hardware:
    """What a cluster offers.

    Attributes:
        memory_gib: of one GPU.
        peak_tflops: of one GPU in the training's precision.
        efficiency: share of the peak that the model's matrix products reach.
        memory_gb_s: bandwidth of one GPU's own memory.
        inside_gb_s: bandwidth of one GPU to others of its node, each way.
        between_gb_s: bandwidth of one GPU to other nodes, each way.
    """

    memory_gib: float = 80.0
    peak_tflops: float = 989.0
    efficiency: float = 0.35
    memory_gb_s: float = 3350.0
    inside_gb_s: float = 450.0
    between_gb_s: float = 50.0


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends in a step: inside its node, and to other nodes."""

    inside: float = 0.0
    between: float = 0.0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.inside + other.inside, self.between + other.between)

    def seconds(self, hardware: Hardware) -> float:
        return self.inside / (hardware.inside_gb_s * 1e9) + self.between / (hardware.between_gb_s * 1e9)


@dataclass(frozen=True)
class Speed:
    """A step: bytes by purpose, seconds of computation and of sending, and the share of time that a pipeline waits."""

    traffic: dict[str, Traffic]
    compute_s: float
    traffic_s: float
    bubble: float
    tokens: int

    @property
    def step_s(self) -> float:
        return (self.compute_s + self.traffic_s) / (1.0 - self.bubble)

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.step_s


def estimate(layout: Layout, experts_per_token: float, hardware: Hardware) -> Speed:
    """Time by the slower of arithmetic and of reading weights and writing gradients, and by what is sent.

    Nothing is assumed to overlap: gradients are exchanged after the backward pass, tokens between router and experts.

    Args:
        layout: of the run.
        experts_per_token: mean over tokens.
        hardware: of the cluster.
    """
    config = layout.config
    full = config.train.recompute == "full"
    flops = layout.size.static_flops(config.tokens_per_step, experts_per_token) * (4 / 3 if full else 1)
    arithmetic = flops / (layout.world_size * hardware.peak_tflops * 1e12 * hardware.efficiency)
    # Each pass reads weights in both directions, and adds gradients in fp32 to those that are there.
    weights = layout.dense_parameters(0) + layout.expert_parameters(0)
    moved = weights * ((3 if full else 2) * layout.element + 8) * layout.accumulation
    compute = max(arithmetic, moved / (hardware.memory_gb_s * 1e9))
    traffic = {
        "gradients and weights": _reduction(layout),
        "tokens to experts": _all_to_all(layout, experts_per_token),
        "tensor parallelism": _tensor(layout),
        "pipeline": _pipeline(layout),
    }
    sent = sum(traffic.values(), Traffic()).seconds(hardware)
    parallel, passes = config.parallel, layout.accumulation
    waits = (parallel.pipeline - 1) / parallel.virtual_pipeline
    return Speed(traffic, compute, sent, waits / (passes + waits), config.tokens_per_step)


def _spread(layout: Layout, size: int, stride: int) -> tuple[int, int]:
    """Members of a group on one node, and nodes that it spans; ranks of the group are ``stride`` apart."""
    here = min(size, max(1, layout.ranks_per_node // stride))
    return here, -(-size // here)


def _ring(layout: Layout, bytes_: float, size: int, stride: int) -> Traffic:
    """A reduce-scatter or an all-gather of ``bytes_``, first inside each node and then, of a share, between them."""
    here, nodes = _spread(layout, size, stride)
    return Traffic(bytes_ * (here - 1) / here, bytes_ / here * (nodes - 1) / nodes)


def _reduction(layout: Layout) -> Traffic:
    """Gradients to the ranks that step them, weights back."""
    config, parallel = layout.config, layout.config.parallel
    gradient = 4 if config.engine == "megatron" else layout.element
    dense, experts = layout.dense_parameters(0), layout.expert_parameters(0)
    # ZeRO 2 has no room for gradients of several passes: it sends those of each.
    times = layout.accumulation if config.engine == "deepspeed" and config.deepspeed.zero_stage == 2 else 1
    total = Traffic()
    for count, size, stride in (
        (dense, layout.data_parallel, parallel.tensor),
        (experts, layout.expert_data_parallel, parallel.expert),
    ):
        total += _ring(layout, count * (gradient * times + layout.element), size, stride)
    return total


def _all_to_all(layout: Layout, experts_per_token: float) -> Traffic:
    """Each token once to every other rank that holds experts of it and back, and the same for gradients."""
    config, ranks = layout.config, layout.config.parallel.expert
    if ranks == 1:
        return Traffic()
    here, _ = _spread(layout, ranks, 1)
    crossings = 6 if config.train.recompute == "full" else 4
    sent = 0.0
    for layer in [layer for layer in layout.layers(0) if config.model.is_moe_layer(layer)]:
        others = ranks_per_token(experts_per_token, config.model.experts_of(layer), ranks) * (ranks - 1) / ranks
        sent += layout.tokens * layout.accumulation * others * config.model.hidden * layout.element * crossings
    inside = (here - 1) / (ranks - 1)
    return Traffic(sent * inside, sent * (1.0 - inside))


def _tensor(layout: Layout) -> Traffic:
    """Sequence parallelism: gathers and scatters around attention, and around the feed-forward of dense layers."""
    config, size = layout.config, layout.config.parallel.tensor
    if size == 1:
        return Traffic()
    layers = layout.layers(0)
    blocks = len(layers) + sum(not config.model.is_moe_layer(layer) for layer in layers)
    passes = 7 if config.train.recompute == "full" else 5  # forward 2, backward 3
    whole = layout.tokens * size * config.model.hidden * layout.element
    return _ring(layout, whole * passes * blocks * layout.accumulation, size, 1)


def _pipeline(layout: Layout) -> Traffic:
    """Activations to the next stage and gradients back."""
    parallel = layout.config.parallel
    if parallel.pipeline == 1:
        return Traffic()
    crossings = 2 * layout.accumulation * parallel.virtual_pipeline
    sent = layout.tokens * layout.config.model.hidden * layout.element * crossings
    # Ranks of a stage are neighbours: on one node as long as the whole pipeline is.
    return Traffic(sent, 0.0) if layout.nodes == 1 else Traffic(0.0, sent)
