"""Estimate memory, traffic and speed of a configuration before it is queued, and list layouts that fit."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from dynmoe.cli import Help
from dynmoe.config import load_config
from dynmoe.errors import ConfigError, UserError
from dynmoe.plan.dry_start import dry_start
from dynmoe.plan.layout import Layout
from dynmoe.plan.memory import Memory, memory_of_stage
from dynmoe.plan.search import Plan, alternatives, expected_experts, most_experts, plan
from dynmoe.plan.speed import Hardware


def main() -> None:
    program = sys.argv[0] if Path(sys.argv[0]).name != "__main__.py" else "python -m dynmoe.plan"
    parser = argparse.ArgumentParser(program, description=__doc__, formatter_class=Help, allow_abbrev=False)
    parser.add_argument("config", metavar="CONFIG", help="YAML file of the configuration")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of configuration fields")
    parser.add_argument("--nodes", type=int, default=1, help="number of nodes")
    parser.add_argument("--gpus", type=int, default=8, help="GPUs per node, one rank each")
    parser.add_argument("--experts-per-token", type=float, help="mean; default: the configured number, else 2")
    parser.add_argument("--vocab-size", type=int, help="number of embedding rows; default: model.vocab_size")
    for field in dataclasses.fields(Hardware):
        option = f"--{field.name.replace('_', '-')}"
        parser.add_argument(option, type=float, default=field.default, help=field.metadata["meaning"])
    parser.add_argument("--layouts", type=int, default=8, help="number of alternative layouts to list")
    parser.add_argument("--dry-start", action="store_true", help="start every rank, without GPUs and weights")
    given = parser.parse_intermixed_args()
    if given.nodes < 1 or given.gpus < 1:
        raise UserError(f"--nodes {given.nodes} --gpus {given.gpus}: both must be at least 1")
    hardware = Hardware(**{field.name: getattr(given, field.name) for field in dataclasses.fields(Hardware)})
    counts = ("experts_per_token", "vocab_size", "layouts")
    for name, value in (vars(hardware) | {name: getattr(given, name) for name in counts}).items():
        if value is not None and value <= 0:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be above 0")
    config = load_config(given.config, given.overrides)
    vocab_size = given.vocab_size or config.model.vocab_size
    if vocab_size is None:
        problem = "is taken from the tokenizer, which a plan does not have"
        raise ConfigError("model.vocab_size", None, problem, "set it, or use --vocab-size")
    expected = given.experts_per_token or expected_experts(config)
    layout = Layout(config, given.nodes, given.gpus, vocab_size)
    experts = 2.0 if expected is None else expected
    print(_describe_model(layout, experts, assumed=expected is None))
    try:
        config.check_world(layout.world_size)
    except ConfigError as error:
        print(f"The configured layout is invalid: {error}")
    else:
        print(describe(plan(layout, experts, hardware), hardware))
        if given.dry_start:
            _print_dry_start(layout, experts)
    found = alternatives(layout, experts, hardware)
    if not found:
        raise UserError(f"no layout of {layout.world_size} GPUs fits {hardware.memory_gib:g} GiB; use more GPUs")
    print(_table(found[: given.layouts]))


def _describe_model(layout: Layout, experts: float, assumed: bool) -> str:
    size = layout.size
    config = layout.config
    at = f"at {experts:g} experts per token" + (" (assumed; set --experts-per-token)" if assumed else "")
    return (
        f"{size.total_parameters / 1e9:.3g} B parameters, {size.active_parameters(experts) / 1e9:.3g} B active {at}; "
        f"{config.tokens_per_step / 1e6:.3g} M tokens per step; "
        f"{size.static_flops(1, experts) / 1e9:.3g} GFLOPs per token; {config.engine}, {config.train.precision}."
    )


def describe(one: Plan, hardware: Hardware) -> str:
    """Lines that describe the plan of a layout."""
    layout = one.layout
    speed = one.speed
    most = most_experts(layout.config)
    verdict = "fits" if one.fits(hardware) else "DOES NOT FIT"
    lines = [
        f"Configured layout on {layout.nodes} x {layout.ranks_per_node} GPUs: {_words(layout)}",
        f"  memory per rank: {_gib(one.expected)}",
        f"    at {most:g} experts per token, the maximum: {one.largest.total / 2**30:.1f} GiB; "
        f"{verdict} {hardware.memory_gib:g} GiB (with 10 % in reserve)",
    ]
    sent = {purpose: part for purpose, part in speed.traffic.items() if part.inside or part.between}
    if sent:
        lines.append("  sent by each rank per step, inside its node and to other nodes:")
    for purpose, part in sent.items():
        lines.append(f"    {purpose}: {part.inside / 1e9:.2f} GB, {part.between / 1e9:.2f} GB")
    lines.append(
        f"  step: {speed.step_s:.2f} s ({speed.compute_s:.2f} s computation, {speed.traffic_s:.2f} s communication, "
        f"{speed.bubble:.0%} pipeline bubble): {speed.tokens_per_s:,.0f} tokens/s, "
        f"{layout.config.train.steps * speed.step_s / 86400:.1f} days for {layout.config.train.steps} steps"
    )
    return "\n".join(lines)


def _print_dry_start(layout: Layout, experts: float) -> None:
    """Prints the memory of the ranks of each pipeline stage after their start, as planned and as measured."""
    print("Dry start of every rank: memory of weights, gradients and optimizer, before the first step")
    stages = layout.config.parallel.pipeline
    ranks = layout.world_size // stages
    for stage in range(stages):
        found = list(dry_start(layout, range(stage * ranks, (stage + 1) * ranks)))
        planned = memory_of_stage(layout, stage, experts).static
        least, most = (value / 2**30 for value in (min(found), max(found)))
        print(
            f"  stage {stage}, {ranks} ranks: {least:.2f} to {most:.2f} GiB; planned {planned / 2**30:.2f}", flush=True
        )


def _gib(memory: Memory) -> str:
    parts = ", ".join(f"{name} {value / 2**30:.1f}" for name, value in dataclasses.asdict(memory).items())
    return f"{memory.total / 2**30:.1f} GiB ({parts})"


def _words(layout: Layout) -> str:
    config = layout.config
    parallel = config.parallel
    sizes = {"tensor": parallel.tensor, "pipeline": parallel.pipeline, "context": parallel.context}
    words = [f"expert {parallel.expert}", f"data {layout.data_parallel}"]
    words += [f"{name} {size}" for name, size in sizes.items() if size > 1]
    if config.engine == "deepspeed":
        words.append(f"ZeRO {config.deepspeed.zero_stage}")
    words += [f"micro-batch {config.train.micro_batch} x {layout.accumulation}", f"recompute {config.train.recompute}"]
    return ", ".join(words)


def _table(plans: list[Plan]) -> str:
    lines = [
        "Layouts that fit, fastest first (estimates within 1 % of each other are ties):",
        f"{'tokens/s':>12}  {'GiB':>6}  {'max GiB':>7}  layout",
    ]
    lines += [
        f"{one.speed.tokens_per_s:>12,.0f}  {one.expected.total / 2**30:>6.1f}  {one.largest.total / 2**30:>7.1f}  "
        f"{_words(one.layout)}"
        for one in plans
    ]
    return "\n".join(lines)
