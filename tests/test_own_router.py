"""One file and one line add a router, and another file and line a loss: the rest of the project then knows them."""

from __future__ import annotations

import dataclasses
import importlib

import pytest
import torch

from dynmoe.config import describe_fields, load_config
from dynmoe.errors import ConfigError
from dynmoe.hf.export import export
from dynmoe.model import ModelSize
from dynmoe.moe.layer import capture_plans
from dynmoe.plan.layout import Layout
from dynmoe.plan.memory import memory_per_rank
from dynmoe.plan.search import most_experts
from dynmoe.report.command import main as report
from dynmoe.routers import ROUTERS
from dynmoe.trained import open_trained
from harness.processes import WarmTraining
from tests.hf.cases import run_decoder, some_tokens
from tests.hf.test_export import read
from tests.hf.test_import import imported
from tests.moe.cases import tiny_model
from tests.train.cases import read_rows

FIELDS = [
    "data.sequence_length=32", "model.hidden=32", "model.heads=2", "model.kv_heads=1", "model.layers=2",
    "model.moe.experts=4", "model.moe.expert_hidden=32", "model.router.kind=relative", "model.router.share=0.9",
    "train.global_batch=4", "train.micro_batch=2", "train.steps=30", "parallel.expert=2", "schedule.warmup_steps=4",
    "logging.interval=1", "checkpoint.interval=10", "eval.interval=30", "eval.batches=2", "budget.method=pi",
    "budget.experts_per_token=2",
]  # fmt: skip


def add_router(_: int = 0) -> None:
    """The one line: whoever adds a router to the project writes this import into ``dynmoe/routers/__init__.py``."""
    importlib.import_module("tests.relative_router")


@pytest.fixture(scope="module", autouse=True)
def _known():
    """Known to this module, and forgotten by those that follow in this process."""
    add_router()
    from tests.relative_router import Relative

    ROUTERS["relative"] = Relative
    yield
    del ROUTERS["relative"]


@pytest.fixture(scope="module")
def run(corpus_dir, tmp_path_factory):
    """The directory of a run on two expert-parallel ranks that was stopped after ten steps and resumed."""
    runs = tmp_path_factory.mktemp("own") / "runs"
    fields = [f"data.dirs=[{corpus_dir}]", f"run.dir={runs}", "run.name=own", *FIELDS]
    for steps in (10, 30):
        output = runs.parent / f"output-{steps}.txt"
        training = WarmTraining([*fields, f"train.steps={steps}"], 2, 0, output, {}, add_router)
        assert training.wait() == 0, training.output()
    return runs / "own"


def test_it_trains_at_the_budget_and_logs_its_control_value_and_losses(run):
    rows = read_rows(run / "metrics.jsonl")
    assert [row["train/step"] for row in rows] == list(range(1, 31))
    late = [row["moe/layer_01/experts_per_token_mean"] for row in rows[20:]]
    assert sum(late) / len(late) == pytest.approx(2.0, abs=0.1)
    assert rows[-1]["moe/layer_00/router_share"] != pytest.approx(0.9)
    losses = {name: rows[-1][f"moe/layer_00/{name}_loss"] for name in ("balance", "spread", "auxiliary")}
    assert losses["auxiliary"] == pytest.approx(1e-2 * losses["balance"] + 1e-3 * losses["spread"])
    assert rows[-1]["train/lm_loss"] < rows[0]["train/lm_loss"]


def test_it_is_reported(run, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["report", str(run)])
    report()
    assert "report.html" in capsys.readouterr().out
    page = (run / "report.html").read_text()
    assert "4 experts per layer, relative router" in " ".join(page.split())


def test_it_is_planned():
    config = load_config(None, FIELDS)
    assert most_experts(config) == 4
    layout = Layout(config, nodes=1, ranks_per_node=2, vocab_size=448)
    assert memory_per_rank(layout, 3.0).total > memory_per_rank(layout, 2.0).total
    model = tiny_model("model.router.kind=relative")
    assert ModelSize(model, 64, 8).layer(0).router == 4 * model.hidden


def test_its_export_computes_the_same_and_comes_back(run, tmp_path, away_from_the_hub):
    assert export(run, tmp_path / "out").architecture == "dynmoe"
    assert "tests." not in (tmp_path / "out" / "routers_dynmoe.py").read_text()
    trained = open_trained(run, torch.device("cpu"))
    expected, maps = run_decoder(trained.decoder, some_tokens())
    model = read(tmp_path / "out")
    with torch.no_grad():
        found = model(some_tokens(), output_router_logits=True)
    torch.testing.assert_close(found.logits, expected, rtol=0, atol=1e-5)
    assert torch.equal(found.experts_per_token, torch.stack([routed.sum(dim=-1) for routed in maps]))
    assert found.experts_per_token.float().std() > 0
    with capture_plans(trained.decoder.moe_layers) as plans, torch.no_grad():
        trained.decoder(some_tokens())
    own = [
        1e-2 * loss["balance"] + 1e-3 * loss["spread"]
        for layer, plan in zip(trained.decoder.moe_layers, plans, strict=True)
        for loss in [layer.router.losses(plan)]
    ]
    torch.testing.assert_close(found.aux_loss, torch.stack(own).sum())
    _, decoder = imported(tmp_path / "out", tmp_path / "run")
    torch.testing.assert_close(run_decoder(decoder, some_tokens())[0], expected, rtol=0, atol=1e-5)
    config = load_config(tmp_path / "run" / "config.yaml")
    before = load_config(run / "config.yaml")
    assert dataclasses.asdict(config.model.router.resolved) == dataclasses.asdict(before.model.router.resolved)
    assert config.budget.experts_per_token == 2.0


def test_its_fields_are_listed_and_refused_elsewhere():
    listed = {name: meaning for name, _, _, meaning in describe_fields()}
    assert listed["model.router.share"].startswith("relative: share of the highest probability")
    assert "relative" in listed["model.router.balance_loss"]
    with pytest.raises(ConfigError, match=r"model\.router\.share=0\.3: is not a field of the top_p router; remove it"):
        load_config(None, ["model.router.share=0.3"])
    with pytest.raises(ConfigError, match=r"model\.router\.share=0\.0: is too small; use a value above 0"):
        load_config(None, ["model.router.kind=relative", "model.router.share=0"])
