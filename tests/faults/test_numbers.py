"""F13 and F14: non-finite losses and gradients, and loss spikes, never reach the optimizer."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import asdict
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dynmoe.config.guard import GuardConfig
from dynmoe.engines.nonfinite import GradientWatch
from dynmoe.train.engine import Gradients
from dynmoe.train.guard import GuardState, StepGuard
from tests.engines.cases import VOCAB, config_for, make_engine, micro_batches, whole_state
from tests.faults.cases import errors
from tests.faults.injection import replace
from tests.train.cases import TrainingProcess, curve, parameter_hashes, read_rows

WHOLE = "train.micro_batch=2"
HALF = "train.micro_batch=1"
LAYOUTS = {
    "DeepSpeed EP 2": ["parallel.expert=2", HALF],
    "DeepSpeed EP 2 ZeRO 0": ["parallel.expert=2", "deepspeed.zero_stage=0", HALF],
    "DeepSpeed DP 2 ZeRO 2": ["deepspeed.zero_stage=2", HALF],
    "DeepSpeed EP 2 ZeRO 3": ["parallel.expert=2", "deepspeed.zero_stage=3", HALF],
    "DeepSpeed EP 2 bf16": ["parallel.expert=2", "train.precision=bf16", HALF],
    "DeepSpeed EP 2 bf16 ZeRO 0": ["parallel.expert=2", "train.precision=bf16", "deepspeed.zero_stage=0", HALF],
    "Megatron EP 2": ["engine=megatron", "parallel.expert=2", HALF],
    "Megatron PP 2": ["engine=megatron", "parallel.pipeline=2", WHOLE],
}
FAST = ("DeepSpeed EP 2", "Megatron PP 2")
TOP_ANY = ["model.router.kind=top_any", "budget.method=loss_free", "budget.experts_per_token=2"]


def poison(engine: Any, rank: int, fault: str, value: float) -> tuple[str, Any]:
    """Injects ``value`` into the next step of a rank; returns the parameter to be named and a handle for removal."""
    config = engine.config.model
    if engine.config.engine == "megatron":
        from dynmoe.engines.megatron.weights import weights

        own = {weight.name: weight.parameter for model in engine.models for weight in weights(model, config)}
    else:
        own = dict(engine.module.named_parameters())
    name = {"dense": "layers.1.attention.w_out", "expert": "layers.1.moe.experts.w_down_EHD"}.get(fault, "")
    name = next((known for known in own if name and known.startswith(name.rsplit("_", 1)[0])), "")
    if dist.get_rank() != rank:
        return name, None
    if fault == "scores":
        router = next(layer.router for layer in engine.layers if layer.layer == 1)
        return "", router.register_forward_pre_hook(lambda module, inputs: (inputs[0] * value,))

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        spoilt = gradient.clone()
        spoilt[-1] = value
        return spoilt

    parameter: nn.Parameter = own[name]
    return name, parameter.register_hook(spoil)  # runs before the hooks of GradientWatch


def meet(overrides: list[str], rank: int, fault: str, value: float) -> dict[str, Any]:
    """Runs two steps, a step with the fault, which is skipped, and another step; returns messages and changes."""
    engine = make_engine(config_for(*overrides), VOCAB)
    config = engine.config

    def gradients(step: int) -> Gradients:
        batches = micro_batches(config, step, engine.data_rank, engine.data_size)
        return engine.compute_gradients(batches, record=False)

    for step in range(2):
        gradients(step)
        engine.update(config.optimizer.lr)
    before = whole_state(engine)
    name, handle = poison(engine, rank, fault, value)
    bad = gradients(2)
    text = engine.describe_nonfinite()
    engine.skip()
    after = whole_state(engine)
    if handle is not None:
        handle.remove()
    report = engine.report()
    following = gradients(3)
    engine.update(config.optimizer.lr)
    return {
        "finite": bad.finite, "text": text, "name": name, "following": following.finite, "rows": report.routed_rows,
        "untouched": all(torch.equal(value, after[key]) for key, value in before.items()),
        "moved": any(not torch.equal(value, after[key]) for key, value in whole_state(engine).items()),
        "next": (following.lm_loss, following.grad_norm),
    }  # fmt: skip


def without_the_step(overrides: list[str]) -> tuple[float, float]:
    """Loss and norm of the step after the fault, in a run without the faulty step."""
    engine = make_engine(config_for(*overrides), VOCAB)
    for step in (0, 1, 3):
        batches = micro_batches(engine.config, step, engine.data_rank, engine.data_size)
        gradients = engine.compute_gradients(batches, record=False)
        engine.update(engine.config.optimizer.lr)
    return gradients.lm_loss, gradients.grad_norm


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in LAYOUTS]
)
def test_f13_nonfinite_step_is_skipped_on_every_rank(two_ranks, layout):
    overrides = [*LAYOUTS[layout], *TOP_ANY]
    expected = two_ranks.run(without_the_step, overrides)[0]
    holder = 1  # in a pipeline, of the second layer
    for fault, value in (("scores", math.nan), ("dense", math.inf), ("expert", math.nan), ("dense", -math.inf)):
        results = two_ranks.run(meet, overrides, holder, fault, value)
        first = results[0]
        for result in results:
            assert not result["finite"], fault
            assert result["text"] == first["text"], "the same message on every rank"
            assert result["untouched"], fault
            assert result["following"], fault
            assert result["moved"], "the next step updates the model"
            assert result["next"] == expected, "the skipped step has no effect"
        named = results[holder]["name"]
        if fault == "scores":
            assert f"router scores are not finite in layer 1 on rank {holder}" in first["text"]
        elif fault == "expert":
            assert f"{named} (expert " in first["text"]
            assert first["text"].endswith(f"on rank {holder}"), first["text"]
        else:
            assert f"the first non-finite gradient is that of {named} on rank {holder}" in first["text"]


def gradients_that_are_read(overrides: list[str]) -> tuple[list[int], str]:
    """Number of gradients checked after a valid step, after a faulty one, and after its description; and the text.

    The fault occurs once, on one rank, and not when the step is computed again.
    """
    struck = []
    counts = []

    def spoil_once(gradient: torch.Tensor) -> torch.Tensor:
        if engine.step == 2 and dist.get_rank() == 0 and not struck:
            struck.append(True)
            return gradient * math.nan
        return gradient

    with patch.object(GradientWatch, "_see", autospec=True, side_effect=GradientWatch._see) as see:
        engine = make_engine(config_for(*overrides), VOCAB)
        batches = micro_batches(engine.config, 0, engine.data_rank, engine.data_size)
        next(engine.layers[0].experts.parameters()).register_hook(spoil_once)
        engine.compute_gradients(batches, record=False)
        counts.append(see.call_count)
        engine.update(engine.config.optimizer.lr)
        assert not engine.compute_gradients(batches, record=False).finite
        counts.append(see.call_count)
        text = engine.describe_nonfinite()
        counts.append(see.call_count)
    return counts, text


@pytest.mark.parametrize("overrides", [[HALF], ["engine=megatron", HALF]], ids=["DeepSpeed", "Megatron"])
def test_f13_gradients_are_checked_only_after_a_nonfinite_step(two_ranks, overrides):
    for counts, text in two_ranks.run(gradients_that_are_read, overrides):
        assert counts[:2] == [0, 0], "no check without a fault"
        assert counts[2] > 4 * 10, "all gradients of four forward passes"
        assert text.startswith("the gradient norm is nan, but ")
        assert text.endswith("finite on every rank when the step was computed again: suspect the hardware")


def spoil_losses(rank: int, steps: dict[int, float]) -> None:
    """Replaces the losses of ``steps`` on every rank."""

    def make(function: Any) -> Any:
        @functools.wraps(function)
        def compute(engine: Any, *arguments: Any) -> Gradients:
            gradients = function(engine, *arguments)
            return Gradients(steps.get(engine.step, gradients.lm_loss), gradients.grad_norm)

        return compute

    replace("dynmoe.engines.deepspeed:DeepSpeedEngine.compute_gradients", make)


def test_f13_consecutive_nonfinite_steps_end_the_run_with_the_reason(corpus_dir, tmp_path):
    steps = {5: math.nan, 6: math.inf, 9: math.nan, 10: math.nan, 11: math.nan}
    process = TrainingProcess(
        corpus_dir, tmp_path / "runs", "checkpoint.interval=4", prepare=functools.partial(spoil_losses, steps=steps)
    )
    assert process.wait() != 0
    run = tmp_path / "runs" / "tiny"
    (line,) = set(errors(process))
    assert line.startswith("error: step 11: ")
    assert "guard.max_consecutive_nonfinite_steps=3 was reached" in line
    outcome = json.loads((run / "outcome.json").read_text())
    assert outcome["status"] == "failed"
    assert "guard.max_consecutive_nonfinite_steps=3" in outcome["error"]
    incidents = read_rows(run / "incidents.jsonl")
    assert [(entry["step"], entry["kind"]) for entry in incidents] == [(step, "not finite") for step in (5, 6, 9, 10)]
    rows = {row["train/step"]: row for row in read_rows(run / "metrics.jsonl")}
    assert rows[8]["train/skipped_steps"] == 2
    assert "train/lm_loss" not in rows[5]
    assert "NaN" not in (run / "metrics.jsonl").read_text(), "not valid JSON"
    assert "step 5/40  loss not finite" in process.output()


GUARD = GuardConfig(spike_window=8, spike_deviations=4.0, spike_skips=2)


def judge(guard: StepGuard, losses: list[float]) -> list[str]:
    """For each loss, whether its step is used (t), skipped as a spike (s) or as not finite (n)."""
    verdicts = []
    for loss in losses:
        gradients = Gradients(loss, 1.0)
        verdicts.append("n" if guard.is_nonfinite(gradients) else "s" if guard.spike(gradients) else "t")
    return verdicts


def test_f14_loss_spike_is_skipped_and_not_added_to_the_window():
    calm = [2.0, 2.1, 1.9, 2.0, 2.05, 1.95, 2.0, 2.1]
    guard = StepGuard(GUARD, GuardState())
    assert judge(guard, [9.0, *calm]) == ["t"] * 9, "the window is not full yet"
    window = list(guard.state.losses)
    assert judge(guard, [9.0, math.nan, math.inf, 8.0]) == ["s", "n", "n", "s"]
    assert guard.state.losses == window, "the window has no spike and no NaN"
    assert guard.state.skipped_steps == 4
    assert judge(guard, [7.0]) == ["t"], "at most two consecutive skips"
    assert guard.state.losses == [7.0], "a new window begins"
    assert judge(guard, [7.1, 6.9, 7.0, 7.2, 6.8, 7.0, 7.1, 7.0]) == ["t"] * 8
    assert judge(guard, [2.0]) == ["t"], "a drop is not a spike"


def test_f14_loss_window_survives_a_resume():
    losses = [2.0, 2.1, 1.9, 2.0, 2.05, 1.95, 2.0, 2.1, 9.0, 2.0, math.nan, 8.0, 7.0, 6.0, 2.0, 2.0]
    whole = judge(StepGuard(GUARD, GuardState()), losses)
    assert "s" in whole
    for cut in range(len(losses)):
        first = StepGuard(GUARD, GuardState())
        verdicts = judge(first, losses[:cut])
        saved = json.loads(json.dumps(asdict(first.state)))
        assert verdicts + judge(StepGuard(GUARD, GuardState(**saved)), losses[cut:]) == whole, cut


def test_f14_noise_after_equal_losses_is_not_a_spike():
    guard = StepGuard(GUARD, GuardState())
    assert judge(guard, [2.0] * 8 + [2.004, 2.0, 2.1]) == ["t"] * 10 + ["s"]


@pytest.mark.slow
def test_f14_run_with_loss_spikes_resumes_bitwise(corpus_dir, tmp_path):
    overrides = ["guard.spike_window=8", "guard.spike_skips=2", "checkpoint.interval=6"]
    prepare = functools.partial(spoil_losses, steps={15: 90.0, 18: 80.0, 19: 80.0, 20: 80.0, 33: 70.0})
    made = []
    for kills in ([], [16, 19]):  # before, within and after a spike
        runs = tmp_path / f"{len(kills)} kills" / "runs"
        runs.parent.mkdir()
        for step in kills:
            process = TrainingProcess(corpus_dir, runs, *overrides, prepare=prepare)
            process.wait_for_row(runs / "tiny" / "metrics.jsonl", step)
            process.kill_tree()
        process = TrainingProcess(corpus_dir, runs, *overrides, prepare=prepare)
        assert process.wait() == 0, process.output()
        entries = map(json.loads, (runs / "tiny" / "incidents.jsonl").read_text().splitlines())
        incidents = [entry for entry in entries if entry["kind"] != "straggler"]  # which depend on the machine
        made.append((curve(runs / "tiny" / "metrics.jsonl"), parameter_hashes(runs / "tiny", 40), incidents))
    assert made[0] == made[1]
    kinds = [(entry["step"], entry["kind"]) for entry in made[0][2]]
    assert kinds == [(step, "spike") for step in (15, 18, 19, 33)], "the third step of a spike is used"
    assert float.fromhex(made[0][0][-1]["train/skipped_steps"]) == 4
