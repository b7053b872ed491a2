"""Bytes per link type and time per step, from given peaks and bandwidths, for comparing layouts."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dynmoe.fields import option
from dynmoe.model.matrices import matrices_of_layer
from dynmoe.plan.activations import ranks_reached
from dynmoe.plan.layout import Layout
from dynmoe.train.muon import orthogonalization_flops


@dataclass(frozen=True)
class Hardware:
    """The GPUs and links of a cluster."""

    memory_gib: float = option(80.0, "memory of one GPU, GiB")
    peak_tflops: float = option(989.0, "peak TFLOP/s of one GPU in the training precision")
    efficiency: float = option(0.35, "fraction of the peak that the model's matrix products reach")
    memory_gb_s: float = option(3350.0, "memory bandwidth of one GPU, GB/s")
    inside_gb_s: float = option(450.0, "bandwidth of one GPU inside its node, GB/s per direction")
    between_gb_s: float = option(50.0, "bandwidth of one GPU to other nodes, GB/s per direction")


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends per step, inside its node and to other nodes."""

    inside: float = 0.0
    between: float = 0.0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.inside + other.inside, self.between + other.between)

    def seconds(self, hardware: Hardware) -> float:
        return self.inside / (hardware.inside_gb_s * 1e9) + self.between / (hardware.between_gb_s * 1e9)


@dataclass(frozen=True)
class Speed:
    """One step: traffic by purpose, seconds of computation and communication, pipeline bubble, number of tokens."""

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
    """Estimates a step: the slower of arithmetic and memory traffic (weights and gradients), plus communication.

    With Muon, the arithmetic of its orthogonalization is added. Communication is assumed not to overlap with
    computation.

    Args:
        layout: layout of the run.
        experts_per_token: mean over tokens.
        hardware: hardware of the cluster.
    """
    config = layout.config
    full = config.train.recompute == "full"
    flops = layout.size.static_flops(config.tokens_per_step, experts_per_token) * (4 / 3 if full else 1)
    arithmetic = flops / (layout.world_size * hardware.peak_tflops * 1e12 * hardware.efficiency)
    # Each micro-batch reads the weights forward and backward, and accumulates gradients in fp32.
    weights = layout.dense_parameters(layout.heaviest_stage) + layout.expert_parameters(layout.heaviest_stage)
    moved = weights * ((3 if full else 2) * layout.element + 8) * layout.accumulation
    compute = max(arithmetic, moved / (hardware.memory_gb_s * 1e9))
    if config.optimizer.kind == "muon":
        compute += _muon_flops(layout) / (hardware.peak_tflops * 1e12 * hardware.efficiency)
    traffic = {
        "gradients and weights": _reduction(layout),
        "matrices of Muon": _muon(layout),
        "tokens to experts": _all_to_all(layout, experts_per_token),
        "tensor parallelism": _tensor(layout),
        "context parallelism": _context(layout),
        "pipeline": _pipeline(layout),
    }
    sent = sum(traffic.values(), Traffic()).seconds(hardware)
    waits = (config.parallel.pipeline - 1) / config.parallel.virtual_pipeline
    return Speed(traffic, compute, sent, waits / (layout.accumulation + waits), config.tokens_per_step)


def _spread(layout: Layout, size: int, stride: int) -> tuple[int, int]:
    """Members of a group on one node, and nodes that it spans; ranks of the group are ``stride`` apart."""
    here = min(size, max(1, layout.ranks_per_node // stride))
    return here, -(-size // here)


def _ring(layout: Layout, bytes_: float, size: int, stride: int) -> Traffic:
    """A reduce-scatter or all-gather of ``bytes_``: inside each node, then of one share between nodes."""
    here, nodes = _spread(layout, size, stride)
    return Traffic(bytes_ * (here - 1) / here, bytes_ / here * (nodes - 1) / nodes)


def _reduction(layout: Layout) -> Traffic:
    """Reduction of gradients to the ranks that own them, and the gather of the weights."""
    config = layout.config
    gradient = 4 if config.engine == "megatron" else layout.element
    stage = config.deepspeed.zero_stage if config.engine == "deepspeed" else 1
    # From ZeRO 2 on gradients are reduced after every micro-batch, because they are not stored whole. ZeRO 3 gathers
    # weights for every pass of every micro-batch.
    times = layout.accumulation if stage >= 2 else 1
    passes = 3 if config.train.recompute == "full" else 2
    gathers = passes * layout.accumulation if stage == 3 else 1
    total = Traffic()
    for count, size, stride in (
        (layout.dense_parameters(layout.heaviest_stage), layout.data_parallel, config.parallel.tensor),
        (layout.expert_parameters(layout.heaviest_stage), layout.expert_data_parallel, config.parallel.expert),
    ):
        total += _ring(layout, count * (gradient * times + layout.element * gathers), size, stride)
    return total


def _muon_flops(layout: Layout) -> float:
    """FLOPs with which a rank orthogonalizes its share of the matrices of its stage."""
    model = layout.config.model
    parallel = layout.config.parallel
    ranks = {
        False: layout.data_parallel * parallel.tensor,
        True: layout.expert_data_parallel * parallel.expert,
    }
    return sum(
        count * orthogonalization_flops(rows, columns) / ranks[experts]
        for layer in layout.layers(layout.heaviest_stage)
        for experts in ranks
        for rows, columns, count in matrices_of_layer(model, layer, experts)
    )


def _muon(layout: Layout) -> Traffic:
    """Parts of matrices to the ranks that orthogonalize them, and their updates back."""
    config = layout.config
    if config.optimizer.kind != "muon":
        return Traffic()
    stage = layout.heaviest_stage
    whole = config.engine == "deepspeed" and config.deepspeed.zero_stage == 0  # ranks hold all parts already
    dense = layout.data_parallel
    experts = layout.expert_data_parallel
    total = Traffic()
    for count, replicas, size, stride in (
        (layout.dense_matrices(stage), dense, dense * config.parallel.tensor, 1),
        (layout.expert_parameters(stage), experts, experts, config.parallel.expert),
    ):
        if size == 1:
            continue
        here, _ = _spread(layout, size, stride)
        sent = count * layout.element * (1.0 if whole else 2 / replicas) * (size - 1) / size
        inside = (here - 1) / (size - 1)
        total += Traffic(sent * inside, sent * (1.0 - inside))
    return total


def _all_to_all(layout: Layout, experts_per_token: float) -> Traffic:
    """Each token to every other rank with its experts and back, and the same for gradients."""
    config = layout.config
    ranks = config.parallel.expert
    if ranks == 1:
        return Traffic()
    here, _ = _spread(layout, ranks, 1)
    crossings = 6 if config.train.recompute == "full" else 4
    sent = 0.0
    for layer in [layer for layer in layout.layers(layout.heaviest_stage) if config.model.is_moe_layer(layer)]:
        others = ranks_reached(config.model, layer, experts_per_token, ranks) * (ranks - 1) / ranks
        sent += layout.tokens * layout.accumulation * others * config.model.hidden * layout.element * crossings
    inside = (here - 1) / (ranks - 1)
    return Traffic(sent * inside, sent * (1.0 - inside))


def _tensor(layout: Layout) -> Traffic:
    """Sequence parallelism: all-gather and reduce-scatter around attention and dense feed-forward layers."""
    config = layout.config
    size = config.parallel.tensor
    if size == 1:
        return Traffic()
    layers = layout.layers(layout.heaviest_stage)
    blocks = len(layers) + sum(config.model.has_feed_forward(layer) for layer in layers)
    collectives = 7 if config.train.recompute == "full" else 5  # forward 2, backward 3
    whole = layout.tokens * size * config.model.hidden * layout.element
    return _ring(layout, whole * collectives * blocks * layout.accumulation, size, 1)


def _context(layout: Layout) -> Traffic:
    """Queries, keys, values and outputs of attention, and their gradients, between parts of sequences and of heads."""
    config = layout.config
    model = config.model
    tensor, ranks = config.parallel.tensor, config.parallel.context
    if ranks == 1:
        return Traffic()
    heads = model.heads // tensor
    pairs = math.lcm(model.kv_heads // tensor, ranks)  # keys and values, repeated for all ranks
    passes = 3 if config.train.recompute == "full" else 2
    layers = len(layout.layers(layout.heaviest_stage))
    rows = layout.tokens * tensor * layout.accumulation * layers  # the tensor-parallel ranks' as well
    numbers = (heads + pairs) * (model.width_of_head + model.width_of_value)
    sent = rows * numbers * layout.element * passes / ranks
    here, _ = _spread(layout, ranks, tensor)
    return Traffic(sent * (here - 1), sent * (ranks - here))


def _pipeline(layout: Layout) -> Traffic:
    """Activations to the next stage, and gradients back."""
    parallel = layout.config.parallel
    if parallel.pipeline == 1:
        return Traffic()
    crossings = 2 * layout.accumulation * parallel.virtual_pipeline
    sent = layout.tokens * layout.config.model.hidden * layout.element * crossings
    # The ranks of a stage are adjacent, so stages are on different nodes if there are several.
    return Traffic(sent, 0.0) if layout.nodes == 1 else Traffic(0.0, sent)
