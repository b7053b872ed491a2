"""What is read from a trace for a replay, what is refused, and train.py with train.replay."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch

from dynmoe.config import load_config
from dynmoe.data.batches import Batch
from dynmoe.errors import ConfigError, UserError
from dynmoe.model import Decoder
from dynmoe.moe.layer import capture_plans
from dynmoe.moe.replay import ROUTED, RoutingReplay
from dynmoe.train.replay import ReplaySource, read_step
from tests.moe.cases import tiny_model
from tests.train.cases import TrainingProcess, read_rows

EXPERTS = 5
LENGTH = 6
LAYERS = (1, 3)
# Two micro-batches of a rank, between which another rank has samples.
SAMPLES = [range(10, 12), range(14, 16)]
TOKENS = torch.arange(4 * LENGTH).view(4, LENGTH) * 7 % 50


def rows() -> list[dict[str, Any]]:
    """The whole trace of a step: every sample, also those of the other rank, in an order of its own."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for layer in (3, 1, 0):
        for sample in (15, 14, 13, 12, 11, 10):
            for position in range(LENGTH):
                kinds = torch.randint(4, (EXPERTS,), generator=generator).tolist()
                place = [sample for own in SAMPLES for sample in own].index(sample) if sample not in (12, 13) else 0
                made.append({
                    "layer": layer, "sample": sample, "position": position, "token": int(TOKENS[place, position]),
                    "experts": [e for e, kind in enumerate(kinds) if kind == 1],
                    "dropped": [e for e, kind in enumerate(kinds) if kind == 2],
                })  # fmt: skip
    return made


def layers(active: int = EXPERTS) -> list[Any]:
    active_E = torch.arange(EXPERTS) < active
    return [SimpleNamespace(layer=layer, router=SimpleNamespace(active_E=active_E)) for layer in LAYERS]


def write(folder: Path, trace: list[dict[str, Any]], files: int = 2) -> Path:
    folder.mkdir()
    for number in range(files):
        frame = pd.DataFrame(trace[number::files]).astype({"layer": "int16", "position": "int32", "token": "int32"})
        frame.to_parquet(folder / f"rank_{number:05d}.parquet")
    return folder


def batches() -> list[Batch]:
    return [Batch(tokens, tokens) for tokens in TOKENS.split(2)]


@pytest.mark.parametrize("positions", [range(LENGTH), [4, 5, 0, 1]])
def test_the_routes_of_a_step_are_those_of_the_trace(tmp_path, positions):
    """With all positions, or those of a context-parallel rank."""
    trace = rows()
    replay = read_step(write(tmp_path / "step", trace), layers(), SAMPLES, batches(), torch.tensor(list(positions)))
    for layer in LAYERS:
        for number, samples in enumerate(SAMPLES):
            routes = replay.routes(layer, number, torch.device("cpu"))
            token = 0
            for sample in samples:
                for position in positions:
                    (row,) = (r for r in trace if (r["layer"], r["sample"], r["position"]) == (layer, sample, position))
                    for expert in range(EXPERTS):
                        routed = expert in row["experts"]
                        assert bool(routes.routed_TE[token, expert]) == routed
                        assert bool(routes.selected_TE[token, expert]) == (routed or expert in row["dropped"])
                    token += 1
            assert len(routes.routed_TE) == token


def changed(**changes: Any) -> list[dict[str, Any]]:
    """The trace with changes of the row of layer 3, sample 14, position 2."""
    return [row | changes if (row["layer"], row["sample"], row["position"]) == (3, 14, 2) else row for row in rows()]


DATA = "replay with the data, train.seed, train.global_batch and data.sequence_length of the traced run"
ACTIVE = "start from a checkpoint of the traced run, or replay a run with these experts"
REFUSED = {
    "layer": ([row for row in rows() if row["layer"] != 3], "has no layer 3; replay a run whose MoE layers"),
    "sample": ([row for row in rows() if row["sample"] != 15],
               f"layer 1: position 0 of sample 15 is missing; {DATA}"),
    "position": (changed(position=LENGTH), f"layer 3: position 2 of sample 14 is missing; {DATA}"),
    "negative": (changed(position=-1), f"layer 3: position 2 of sample 14 is missing; {DATA}"),
    "token": (changed(token=49),
              f"layer 3: position 2 of sample 14 is token 49, but {TOKENS[2, 2]} in this run; {DATA}"),
    "twice": ([*rows(), *[row for row in rows() if (row["layer"], row["sample"], row["position"]) == (1, 11, 4)]],
              "layer 1: position 4 of sample 11 is there twice; remove the files of other runs"),
    "expert": (changed(experts=[1, EXPERTS]),
               f"layer 3: position 2 of sample 14 uses expert 5, which is not active in this run; {ACTIVE}"),
    "dropped": (changed(dropped=[-1]), "layer 3: position 2 of sample 14 uses expert -1, which is not active"),
}  # fmt: skip


def test_layers_without_routes_select_their_experts_themselves():
    """As those that predict further tokens, which generation does not use and its trace therefore lacks."""
    model = Decoder(tiny_model("model.mtp.layers=1"), 50, seed=0).train()
    replay = RoutingReplay()
    tokens_BS = torch.randint(50, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    ahead = [(tokens_BS.roll(-1, dims=1), tokens_BS)]
    chosen = {}
    for own in (None, replay):
        with model.context.override(replay=own), capture_plans(model.moe_layers) as plans:
            model(tokens_BS, tokens_BS, ahead=ahead)
        chosen[own] = [plan.routing_map_TE for plan in plans]
        for layer, map_TE in zip(model.moe_layers[:-1], chosen[own][:-1], strict=True):
            replay.add(layer.layer, 0, ROUTED * (~map_TE).byte())
    assert model.moe_layers[-1].layer == 2
    assert [map_TE.tolist() for map_TE in chosen[replay][:-1]] == [(~map_TE).tolist() for map_TE in chosen[None][:-1]]
    assert chosen[replay][-1].sum() >= len(tokens_BS) * LENGTH


@pytest.mark.parametrize("name", REFUSED)
def test_a_trace_that_does_not_fit_is_refused_in_one_line(tmp_path, name):
    trace, expected = REFUSED[name]
    folder = write(tmp_path / "step", trace)
    with pytest.raises(UserError) as caught:
        read_step(folder, layers(), SAMPLES, batches(), torch.arange(LENGTH))
    assert str(caught.value).startswith(f"{folder}: {expected}")
    assert "\n" not in str(caught.value)


def test_an_inactive_expert_is_refused(tmp_path):
    folder = write(tmp_path / "step", rows())
    with pytest.raises(UserError, match=r"uses expert 4, which is not active in this run"):
        read_step(folder, layers(active=4), SAMPLES, batches(), torch.arange(LENGTH))


def test_a_file_that_is_no_trace_is_refused(tmp_path):
    folder = write(tmp_path / "step", [{name: row[name] for name in row if name != "dropped"} for row in rows()])
    with pytest.raises(UserError, match=r"cannot be read as a trace \(.*dropped.*\); name the directory of a traced"):
        read_step(folder, layers(), SAMPLES, batches(), torch.arange(LENGTH))


def test_steps_and_directories_are_checked_before_training(tmp_path):
    run = tmp_path / "run"
    for step in (1, 2, 4):
        (run / "traces" / f"step_{step:08d}").mkdir(parents=True)
    for named in (run, run / "traces"):
        source = ReplaySource(str(named), tmp_path / "own")
        source.check_steps(1, 2)
        source.check_steps(4, 4)
        with pytest.raises(UserError) as caught:
            source.check_steps(1, 4)
        cure = "trace every step (logging.trace_interval=1), or use train.steps=2"
        assert str(caught.value) == f"train.replay={named}: has no trace of step 3; {cure}"
    with pytest.raises(UserError, match=r"are this run's own traces; use another run\.name"):
        ReplaySource(str(run), run / "traces")
    with pytest.raises(UserError, match=r"nowhere: does not exist; name the directory of a traced run"):
        ReplaySource(str(tmp_path / "nowhere"), run / "traces")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (["budget.method=pi", "budget.experts_per_token=2"],
         "budget.method='pi': replayed experts do not respond to it; use none, or remove train.replay"),
        (["model.router.kind=top_any", "adaptation.interval=10"],
         "adaptation.interval=10: replayed experts do not respond to it; use 0, or remove train.replay"),
        (["model.router.kind=identity_experts"],
         "train.replay='runs/a': traces do not have the part of the output that the identity_experts router computes "
         "itself; remove it, or use another model.router.kind"),
        (["model.moe.experts=0"], "train.replay='runs/a': the model is dense; remove it, or set model.moe.experts"),
    ],
)  # fmt: skip
def test_settings_without_an_effect_in_a_replay_are_refused(fields, message):
    load_config(None, fields)
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        load_config(None, ["train.replay=runs/a", *fields])


FIXED = [
    "budget.method=none", "budget.experts_per_token=null", "adaptation.interval=0", "adaptation.window=1",
    "logging.trace_interval=1", "train.steps=4", "checkpoint.interval=0", "eval.interval=0",
]  # fmt: skip


def test_train_py_replays_a_run_under_another_engine(corpus_dir, tmp_path):
    """The same experts and losses from the same weights, although the second run would select fewer experts."""
    first = TrainingProcess(corpus_dir, tmp_path / "runs", *FIXED)
    assert first.wait() == 0, first.output()
    run = tmp_path / "runs" / "tiny"
    engine = ["engine=megatron", "parallel.expert=1", "parallel.pipeline=2"]
    own = [*FIXED, "run.name=again", *engine, "model.router.max_experts=1", f"train.replay={run}"]
    again = TrainingProcess(corpus_dir, tmp_path / "runs", *own)
    assert again.wait() == 0, again.output()
    place = ["step", "layer", "sample", "position"]
    runs = [run, run.parent / "again"]
    expected, ours = (pd.read_parquet(own / "traces").sort_values(place, ignore_index=True) for own in runs)
    assert len(ours) == 4 * 2 * 4 * 32
    assert ours["experts"].map(list).tolist() == expected["experts"].map(list).tolist()
    assert expected["experts"].str.len().max() > 1
    losses = [[row["train/lm_loss"] for row in read_rows(own / "metrics.jsonl")] for own in runs]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    longer = TrainingProcess(corpus_dir, tmp_path / "runs", *own, "train.steps=5")
    assert longer.wait() != 0
    assert f"train.replay={run}: has no trace of step 5; trace every step" in longer.output()
    assert "Traceback" not in longer.output()
