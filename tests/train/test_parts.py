"""Unit tests of schedules, parameter groups, metrics files and checkpoint stores."""

from __future__ import annotations

import dataclasses
import errno
import json
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest

from dynmoe.config import OptimizerConfig, ScheduleConfig, load, load_config
from dynmoe.convert import _configuration
from dynmoe.errors import ConfigError, UserError
from dynmoe.model import Decoder
from dynmoe.moe.adaptation import AdaptationEvent
from dynmoe.train.checkpoint_store import CheckpointStore
from dynmoe.train.engine import Snapshot
from dynmoe.train.optimizer import parameter_groups
from dynmoe.train.record import RunRecord
from dynmoe.train.resume import check_unchanged, describe_new_order
from dynmoe.train.run_directory import RunDirectory
from dynmoe.train.schedule import learning_rate
from dynmoe.train.step_log import merge


def rates(kind: str, steps: int = 20, **options) -> list[float]:
    schedule = ScheduleConfig(kind=kind, warmup_steps=4, min_lr_ratio=0.1, **options)
    return [learning_rate(step, steps, OptimizerConfig(lr=1.0), schedule) for step in range(1, steps + 1)]


def test_warmup_is_linear_up_to_the_peak():
    for kind in ("cosine", "wsd", "constant"):
        assert rates(kind)[:4] == [0.25, 0.5, 0.75, 1.0]


def test_cosine_decays_to_the_floor():
    values = rates("cosine")
    assert values[3:] == sorted(values[3:], reverse=True)
    assert values[11] == pytest.approx(0.55)  # half way between step 4 and step 20
    assert values[-1] == pytest.approx(0.1)


def test_wsd_is_constant_and_then_decays_linearly():
    values = rates("wsd", decay_fraction=0.25)
    assert values[3:15] == [1.0] * 12
    assert values[15:] == pytest.approx([0.82, 0.64, 0.46, 0.28, 0.1])


def test_constant_schedule_keeps_the_peak():
    assert rates("constant")[4:] == [1.0] * 16


@pytest.mark.parametrize("kind", ["top_p", "top_any"])
def test_every_parameter_is_in_exactly_one_group_of_its_role(kind):
    config = load_config(
        None, [f"model.router.kind={kind}", "model.router.lr_factor=0.5", "model.moe.moe_layer_freq=2"]
    )
    model = Decoder(config.model, 64, seed=0)
    groups = {group["name"]: group for group in parameter_groups(model, config)}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    grouped = [names[id(p)] for group in groups.values() for p in group["params"]]
    assert sorted(grouped) == sorted(names.values())
    assert {names[id(p)].split(".")[-2] for p in groups["no_decay"]["params"]} == {"attention_norm", "ffn_norm", "norm"}
    assert all("router" in names[id(p)] for p in groups["router"]["params"])
    assert (groups["router"]["lr_factor"], groups["router"]["weight_decay"]) == (0.5, 0.1)
    assert (groups["no_decay"]["weight_decay"], groups["decay"]["lr_factor"]) == (0.0, 1.0)
    if kind == "top_any":
        assert [names[id(p)].split(".")[-1] for p in groups["router_no_decay"]["params"]] == ["thresholds_E"] * 2
        assert groups["router_no_decay"]["weight_decay"] == 0.0


def test_logs_are_cut_to_the_resumed_step_and_a_truncated_line_is_dropped(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.metrics.write_text("".join(json.dumps({"train/step": step}) + "\n" for step in (1, 2, 3)) + '{"train/st')
    directory.histograms.write_text("".join(json.dumps({"train/step": step}) + "\n" for step in (2, 3)))
    for step in (2, 3):
        (directory.traces / f"step_{step:08d}").mkdir(parents=True)
    directory.events.write_text("".join(json.dumps({"step": step, "layer": 0}) + "\n" for step in (1, 2, 2, 3)))
    seen: list[object] = []

    class Spy:
        def log(self, row, histograms):
            seen.append((row, histograms))

        def close(self):
            seen.append("closed")

    record = RunRecord(load_config(None, ["train.steps=3"]), directory, 2, [Spy()])
    row = {"train/step": 3, "train/lm_loss": 1.5, "train/tokens_per_s": 1.0}
    record.add_row(row, {"train/step": 3, "layers": {}})
    event = AdaptationEvent(3, 1, 7, 0, "removed", "0 of 64 tokens selected it")
    record.add_events([event])
    record.close()
    rows = [json.loads(line) for line in directory.metrics.read_text().splitlines()]
    assert rows == [{"train/step": 1}, {"train/step": 2}, row]
    events = [json.loads(line) for line in directory.events.read_text().splitlines()]
    assert [event["step"] for event in events] == [1, 2, 2, 3]
    assert events[-1] == dataclasses.asdict(event)
    assert seen == [(row, {"train/step": 3, "layers": {}}), "closed"]
    entries = [json.loads(line) for line in directory.histograms.read_text().splitlines()]
    assert entries == [{"train/step": 2}, {"train/step": 3, "layers": {}}]
    assert [folder.name for folder in directory.traces.iterdir()] == ["step_00000002"]


def test_later_metrics_are_merged_into_the_row_of_their_step_or_a_new_one(tmp_path):
    log = tmp_path / "log.jsonl"
    merge(log, "step", 4, {"loss": 1.0})
    merge(log, "step", 2, {"score": 2.0})
    with log.open("a") as stream:
        stream.write('{"step": 6, "lo')
    merge(log, "step", 4, {"score": 3.0, "loss": 0.5})
    assert [json.loads(line) for line in log.read_text().splitlines()] == [
        {"step": 2, "score": 2.0}, {"step": 4, "loss": 0.5, "score": 3.0},
    ]  # fmt: skip


def test_a_failing_view_is_reported_once_and_does_not_affect_the_others(tmp_path, capsys):
    calls: list[str] = []

    class Spy:
        def __init__(self, name: str, fails_at: int = 0) -> None:
            self.name = name
            self.fails_at = fails_at

        def log(self, row, histograms):
            calls.append(self.name)
            if row["train/step"] == self.fails_at:
                raise OSError("the disk is full")

        def close(self):
            calls.append(f"{self.name} closed")
            if self.fails_at:
                raise SystemExit("the service is gone")

    views = [Spy("early", fails_at=1), Spy("late", fails_at=9), Spy("sound")]
    record = RunRecord(load_config(None, ["train.steps=3"]), RunDirectory(tmp_path), 0, views)
    for step in (1, 2):
        record.add_row({"train/step": step, "train/lm_loss": 1.5, "train/tokens_per_s": 1.0}, None)
    record.close()
    assert calls == ["early", "late", "sound", "late", "sound", "late closed", "sound closed"]
    said = capsys.readouterr().out
    assert said.count("early failed (the disk is full) and is disabled; metrics.jsonl is complete") == 1
    assert said.count("late failed (the service is gone)") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def shard(directory: Path, text: str) -> Snapshot:
    """A snapshot whose state is a line of text."""
    import torch.distributed as dist

    path = directory / f"shard_{dist.get_rank()}"

    def write() -> list[Path]:
        path.write_text(text)
        return [path]

    return Snapshot(write)


def store_scenario(root: str) -> dict[str, object]:
    """Saves, corrupts and loads checkpoints on the ranks of a pool; returns what this rank sees."""
    import torch.distributed as dist

    store = CheckpointStore(Path(root), keep=2)
    found: dict[str, object] = {"empty": store.newest()}
    for step in (1, 2, 3):
        state = {"progress": {"step": step}, "config": {}, "data": []}
        store.begin(step, partial(shard, text=f"state {step}"), state, {"ranks": 2})
        store.wait()
    found["kept"] = sorted(path.name for path in Path(root).iterdir())
    newest = store.newest()
    assert newest is not None
    found["newest"] = (newest.step, newest.trainer_state["progress"])
    dist.barrier()
    if dist.get_rank() == 0:
        (Path(root) / "step_00000003" / "shard_1").write_text("state ?")
        (Path(root) / "step_00000009.tmp-abc").mkdir()
    dist.barrier()
    store.remove_leftovers()
    fallback = store.newest()
    assert fallback is not None
    found["fallback"] = fallback.step
    dist.barrier()
    if dist.get_rank() == 0:
        (Path(root) / "step_00000002" / "manifest.json").unlink()
    dist.barrier()
    try:
        store.newest()
    except UserError as error:
        found["error"] = str(error)
    found["left"] = sorted(path.name.split("-")[0] for path in Path(root).iterdir())
    return found


def test_checkpoints_are_kept_verified_and_quarantined_and_never_silently_lost(two_ranks, tmp_path):
    for found in two_ranks.run(store_scenario, str(tmp_path / "checkpoints")):
        assert found["empty"] is None
        assert found["kept"] == ["step_00000002", "step_00000003"]
        assert found["newest"] == (3, {"step": 3})
        assert found["fallback"] == 2
        assert "no valid checkpoint (step_00000002: manifest.json is missing, damaged" in str(found["error"])
        assert found["left"] == ["step_00000002.damaged", "step_00000003.damaged"]


def store_that_cannot_remove(root: str) -> list[str]:
    """Saves twice where nothing can be removed, as while another process reads a file on a network file system."""
    store = CheckpointStore(Path(root), keep=1)
    busy = OSError(errno.EBUSY, "Device or resource busy")
    with patch("dynmoe.train.checkpoint.rmtree", side_effect=busy), patch("shutil.rmtree", side_effect=busy):
        for step in (1, 2):
            state = {"progress": {"step": step}, "config": {}, "data": []}
            store.begin(step, partial(shard, text=f"state {step}"), state, {"ranks": 2})
            store.wait()
        store.remove_leftovers()
    found = sorted(path.name for path in Path(root).iterdir())
    store.remove_leftovers()
    return found


def test_training_goes_on_if_an_old_checkpoint_cannot_be_removed(one_rank, tmp_path):
    root = tmp_path / "checkpoints"
    assert one_rank.run(store_that_cannot_remove, str(root)) == [["step_00000001.removed", "step_00000002"]]
    assert [path.name for path in root.iterdir()] == ["step_00000002"]


def test_a_dense_model_has_no_moe_metrics():
    from dynmoe.train.engine import StepReport
    from dynmoe.train.metrics import moe_row

    config = load_config(None, ["model.moe.experts=0"])
    assert moe_row(StepReport({}, 0, {}), config, 1) == {}


def test_the_mean_experts_limit_may_change_on_resume():
    """The error about a limit that is too low asks for this change."""
    saved = dataclasses.asdict(load_config(None, ["model.moe.max_mean_experts_per_token=2"]))
    check_unchanged(
        saved,
        dataclasses.asdict(load_config(None, ["model.moe.max_mean_experts_per_token=3", "model.moe.on_overflow=drop"])),
    )
    with pytest.raises(ConfigError, match=r"engine='megatron': the run's checkpoint was saved by deepspeed; keep it"):
        check_unchanged(saved, dataclasses.asdict(load_config(None, ["engine=megatron"])))
    with pytest.raises(ConfigError, match=r"model\.moe\.expert_hidden=64: the run's checkpoint has 512"):
        check_unchanged(saved, dataclasses.asdict(load_config(None, ["model.moe.expert_hidden=64"])))


def test_a_run_from_before_a_field_has_its_default_on_resume():
    fields = ["first_k_dense_replace", "shared_gate"]
    saved = dataclasses.asdict(load_config())
    for name in fields:
        del saved["model"]["moe"][name]
    del saved["model"]["router"]["gate_scale"]
    check_unchanged(saved, dataclasses.asdict(load_config()))
    with pytest.raises(ConfigError, match=r"model\.router\.gate_scale=2\.0: the run's checkpoint has 1\.0"):
        check_unchanged(saved, dataclasses.asdict(load_config(None, ["model.router.gate_scale=2"])))


def test_a_changed_order_of_the_data_is_told_on_resume():
    saved = dataclasses.asdict(load_config(None, ["data.weights=[9,1]", "data.dirs=[a,b]"]))
    for fields, named in (
        ([], None), (["optimizer.lr=1"], None), (["data.weights=[1,1]"], "data.weights"),
        (["data.weights=[1,1]", "train.seed=3"], "data.weights, train.seed"),
    ):  # fmt: skip
        accepted = "checkpoint.accept_changes=[data.weights,train.seed]"
        current = load_config(None, ["data.weights=[9,1]", "data.dirs=[a,b]", accepted, *fields])
        line = describe_new_order(check_unchanged(saved, dataclasses.asdict(current)), 400000)
        assert line is None if named is None else line.startswith(f"{named}: gives another order of the data")
        assert line is None or "(400,000): some text is read again" in line


def test_a_converted_run_starts_on_other_ranks_as_before():
    config = load_config(None, ["run.name=own", "engine=megatron", "parallel.elastic=always", "parallel.tensor=2"])
    made = _configuration(config, Path("runs/new"), "deepspeed", None)
    assert (made.engine, made.parallel.elastic, made.parallel.tensor) == ("deepspeed", "always", 1)


def test_renamed_field_of_a_saved_configuration_is_compared_under_its_new_name(monkeypatch):
    monkeypatch.setattr(load, "_RENAMED", {"model.old_width": "model.hidden"})
    current = dataclasses.asdict(load_config())
    saved = json.loads(json.dumps(current))
    saved["model"]["old_width"] = saved["model"].pop("hidden")
    check_unchanged(saved, current)
    saved["model"]["old_width"] = 64
    with pytest.raises(ConfigError, match=r"model\.hidden=256: the run's checkpoint has 64"):
        check_unchanged(saved, current)
    current["checkpoint"]["accept_changes"] = ["model.old_width"]
    check_unchanged(saved, current)
