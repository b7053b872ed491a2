"""The dashboard as code: its panels name metrics that runs have."""

from __future__ import annotations

import json
import re

import pytest

from dynmoe.config import load_config
from dynmoe.report import dashboard
from dynmoe.report.dashboard import publish
from dynmoe.train.scores import EXPERTS, scores_row
from tests.train.cases import read_rows

# Of runs that this one is not: on a GPU of known peak.
ELSEWHERE = {"train/mfu"}


@pytest.fixture
def definition(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    said = publish(load_config(None, ["logging.wandb_project=mine"]), "", tmp_path / "dashboard.json")
    assert said.startswith("W&B cannot be reached (no API key")
    assert str(tmp_path / "dashboard.json") in said
    return json.loads((tmp_path / "dashboard.json").read_text())


def test_without_an_account_the_definition_is_written(definition, undisturbed):
    assert (definition["project"], definition["displayName"]) == ("mine", "DynMoE")
    sections = definition["spec"]["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections] == [
        "Loss", "Experts per token", "Tasks and domains", "Load", "Router", "Speed", "Pictures",
    ]  # fmt: skip
    rows = read_rows(undisturbed[0] / "metrics.jsonl")
    scored = scores_row({"sums": {"acc": 1.0, EXPERTS: 2.0}}, {"here": {"loss": 3.0, EXPERTS: 2.0}})
    known = {name for row in [*rows, scored] for name in row}
    panels = [panel["config"] for section in sections[:-1] for panel in section["panels"]]
    assert len(panels) > 15
    for panel in panels:
        assert panel["xAxis"] in known
        if panel.get("useMetricRegex"):
            assert any(re.fullmatch(panel["metricRegex"], name) for name in known), panel
        else:
            assert set(panel["metrics"]) - ELSEWHERE <= known, panel


def test_a_server_that_refuses_leaves_the_definition(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(dashboard, "_TIMEOUT_S", 1)
    said = publish(load_config(None, []), "team", tmp_path / "dashboard.json")
    assert said.startswith("W&B cannot be reached (")
    assert json.loads((tmp_path / "dashboard.json").read_text())["entity"] == "team"
