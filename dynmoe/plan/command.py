"""python -m dynmoe.plan CONFIG --nodes N --gpus G: memory, traffic and speed before anybody queues, and what fits."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from dynmoe.config import load_config
from dynmoe.errors import ConfigError, UserError
from dynmoe.plan.layout import Layout
from dynmoe.plan.memory import Memory
from dynmoe.plan.search import Plan, alternatives, expected_experts, most_experts, plan
from dynmoe.plan.speed import Hardware

_EXPLAINED = {
    "memory_gib": "memory of one GPU, GiB",
    "peak_tflops": "peak of one GPU in this precision",
    "efficiency": "share of the peak that the model's matrix products reach",
    "memory_gb_s": "bandwidth of one GPU's own memory, GB/s",
    "inside_gb_s": "bandwidth of one GPU inside its node, GB/s each way",
    "between_gb_s": "bandwidth of one GPU to other nodes, GB/s each way",
}


def main() -> None:
    name = sys.argv[0] if Path(sys.argv[0]).name != "__main__.py" else "python -m dynmoe.plan"
    parser = argparse.ArgumentParser(
        name, description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="fields of the configuration")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=8, help="GPUs of each node, a rank each")
    parser.add_argument("--experts-per-token", type=float, help="mean; default: what the configuration holds, else 2")
    parser.add_argument("--vocab-size", type=int, help="rows of the embedding; default: model.vocab_size")
    for field in dataclasses.fields(Hardware):
        option = f"--{field.name.replace('_', '-')}"
        parser.add_argument(option, type=float, default=field.default, help=_EXPLAINED[field.name])
    parser.add_argument("--layouts", type=int, default=8, help="other layouts that are shown")
    given = parser.parse_intermixed_args()
    if given.nodes < 1 or given.gpus < 1:
        raise UserError(f"--nodes {given.nodes} --gpus {given.gpus}: use at least 1 of both")
    hardware = Hardware(**{field.name: getattr(given, field.name) for field in dataclasses.fields(Hardware)})
    for field in dataclasses.fields(Hardware):
        if getattr(hardware, field.name) <= 0:
            option = field.name.replace("_", "-")
            raise UserError(f"--{option} {getattr(hardware, field.name)}: use a number above 0")
    config = load_config(given.config, given.overrides)
    vocab_size = given.vocab_size or config.model.vocab_size
    if vocab_size is None:
        problem, cure = "the tokenizer decides, and a plan has none", "set it, or give --vocab-size"
        raise ConfigError("model.vocab_size", None, problem, cure)
    expected = given.experts_per_token or expected_experts(config)
    layout = Layout(config, given.nodes, given.gpus, vocab_size)
    experts = 2.0 if expected is None else expected
    print(_describe_model(layout, experts, assumed=expected is None))
    try:
        config.check_world(layout.world_size)
    except ConfigError as error:
        print(f"The configuration's own layout does not fit: {error}")
    else:
        print(describe(plan(layout, experts, hardware), hardware))
    found = alternatives(layout, experts, hardware)[: given.layouts]
    if not found:
        raise UserError(f"no layout of {layout.world_size} GPUs fits {hardware.memory_gib:g} GiB; use more of them")
    print(_table(found))


def _describe_model(layout: Layout, experts: float, assumed: bool) -> str:
    size, config = layout.size, layout.config
    words = f"{experts:g} experts per token" + (" (assumed: --experts-per-token)" if assumed else "")
    total, active = size.total_parameters / 1e9, size.active_parameters(experts) / 1e9
    return (
        f"{total:.3g} B parameters, {active:.3g} B of them active at {words}; "
        f"{config.tokens_per_step / 1e6:.3g} M tokens a step; "
        f"{size.static_flops(1, experts) / 1e9:.3g} GFLOPs a token; {config.engine}, {config.train.precision}."
    )


def describe(one: Plan, hardware: Hardware) -> str:
    """The plan of a layout, in lines."""
    layout, speed = one.layout, one.speed
    most = most_experts(layout.config)
    verdict = "fits" if one.fits(hardware) else "DOES NOT FIT"
    lines = [
        f"Layout of the configuration on {layout.nodes} x {layout.ranks_per_node}: {_words(layout)}",
        f"  memory per rank: {_gib(one.expected)}",
        f"    at {most:g} experts per token, the most that can be: {one.largest.total / 2**30:.1f} GiB; "
        f"{verdict} {hardware.memory_gib:g} GiB (with a tenth left free)",
    ]
    sent = {purpose: part for purpose, part in speed.traffic.items() if part.inside or part.between}
    if sent:
        lines.append("  sent by each rank in a step, inside its node and to other nodes:")
    for purpose, part in sent.items():
        lines.append(f"    {purpose}: {part.inside / 1e9:.2f} GB, {part.between / 1e9:.2f} GB")
    lines.append(
        f"  step: {speed.step_s:.2f} s ({speed.compute_s:.2f} s computing, {speed.traffic_s:.2f} s sending, "
        f"{speed.bubble:.0%} waiting in the pipeline): {speed.tokens_per_s:,.0f} tokens/s, "
        f"{layout.config.train.steps * speed.step_s / 86400:.1f} days for {layout.config.train.steps} steps"
    )
    return "\n".join(lines)


def _gib(memory: Memory) -> str:
    parts = ", ".join(f"{name} {value / 2**30:.1f}" for name, value in dataclasses.asdict(memory).items())
    return f"{memory.total / 2**30:.1f} GiB ({parts})"


def _words(layout: Layout) -> str:
    config, parallel = layout.config, layout.config.parallel
    sizes = {"tensor": parallel.tensor, "pipeline": parallel.pipeline, "context": parallel.context}
    words = [f"expert {parallel.expert}", f"data {layout.data_parallel}"]
    words += [f"{name} {size}" for name, size in sizes.items() if size > 1]
    if config.engine == "deepspeed":
        words.append(f"ZeRO {config.deepspeed.zero_stage}")
    words += [f"micro-batch {config.train.micro_batch} x {layout.accumulation}", f"recompute {config.train.recompute}"]
    return ", ".join(words)


def _table(plans: list[Plan]) -> str:
    lines = [
        "Layouts that fit, by estimated speed (a hundredth more or less is none):",
        f"{'tokens/s':>12}  {'GiB':>6}  {'at most':>7}  layout",
    ]
    lines += [
        f"{one.speed.tokens_per_s:>12,.0f}  {one.expected.total / 2**30:>6.1f}  {one.largest.total / 2**30:>7.1f}  "
        f"{_words(one.layout)}"
        for one in plans
    ]
    return "\n".join(lines)
