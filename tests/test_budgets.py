"""One checkpoint, several budgets: configuration, evaluation, generation, exports and the page of scores."""

from __future__ import annotations

import json
import sys
from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM

from dynmoe import evaluate, generate
from dynmoe.config import load_config
from dynmoe.errors import ConfigError, UserError
from dynmoe.hf.export import export
from dynmoe.moe import MoEContext, MoELayer
from dynmoe.moe.budget import Budget
from dynmoe.moe.router import Router
from dynmoe.report import main as report
from dynmoe.routers.base import at_budget
from dynmoe.train.scores import EXPERTS
from dynmoe.trained import open_trained
from tests.faults.cases import MEGATRON
from tests.hf.cases import begin, run_decoder, some_tokens
from tests.moe.test_causality import train_steps
from tests.train.cases import TrainingProcess

BUDGETS = ["model.router.budgets=[1,1.5,3]", "budget.experts_per_token=1.5"]
TOP_P = ["model.router.kind=top_p", "budget.method=pi", *BUDGETS]


def test_a_value_at_a_budget_is_a_view_and_between_two_a_mean():
    values = torch.tensor([[0.0, 1.0], [2.0, 3.0], [6.0, 9.0]])
    assert at_budget(values, [1.0, 2.0, 4.0], 1.0).tolist() == [0.0, 1.0]
    assert at_budget(values, [1.0, 2.0, 4.0], 2.5).tolist() == [3.0, 4.5]
    at_budget(values, [1.0, 2.0, 4.0], 4.0).add_(1.0)
    assert values[2].tolist() == [7.0, 10.0]


def test_every_budget_is_drawn_as_often_in_an_order_that_depends_on_the_seed():
    drawn = []
    for seed in (1, 2):
        budget = Budget(load_config(None, [*TOP_P, f"train.seed={seed}"]))
        steps = [budget.of_step(step) for step in range(1, 61)]
        assert all(Counter(steps[start : start + 3]) == Counter([1.0, 1.5, 3.0]) for start in range(0, 60, 3))
        assert len({tuple(steps[start : start + 3]) for start in range(0, 60, 3)}) > 3
        drawn.append(steps)
    assert drawn[0] != drawn[1]


def test_without_a_target_a_router_uses_its_most_experts():
    router = Router(load_config(None, TOP_P).model, 16, 0, "router", MoEContext())
    with torch.no_grad():
        router.p.copy_(torch.tensor([0.1, 0.3, 0.8]))
    x_TD = torch.randn(50, 256)
    most = router(x_TD)
    router.context.aim(3.0)
    assert torch.equal(router(x_TD).routing_map_TE, most.routing_map_TE)
    assert router.control_value == pytest.approx(0.8)
    router.context.aim(1.25)
    assert router(x_TD).experts_per_token_T.sum() < most.experts_per_token_T.sum()
    assert router.control_value == pytest.approx(0.2)


@pytest.mark.parametrize(
    "kind",
    [
        "quantile", "seq_top_k",
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("expert_race", "expert_threshold", "resonance")),
    ],
)  # fmt: skip
def test_running_thresholds_of_each_budget_hold_it_in_evaluation(kind):
    k = ["model.router.k=6"] if kind == "resonance" else []
    several = ["model.router.budgets=[1,2,4]", "budget.experts_per_token=2"]
    config = load_config(None, [f"model.router.kind={kind}", "model.hidden=64", *several, *k])
    layer = MoELayer(config.model, 0, 0, MoEContext())

    def inputs(seed: int) -> torch.Tensor:
        return torch.randn(8, 512, 64, generator=torch.Generator().manual_seed(seed))

    train_steps(config, [layer], lambda step: layer(inputs(step)), 30)
    layer.eval()
    found = {}
    for wanted in (1.0, 2.0, 3.0, 4.0):
        layer.context.aim(wanted)
        with torch.no_grad():
            plans = [layer.router(inputs(seed).flatten(0, 1), 8) for seed in range(100, 110)]
        found[wanted] = sum(plan.experts_per_token_T.float().mean().item() for plan in plans) / len(plans)
    for wanted in (1.0, 2.0, 4.0):
        assert found[wanted] == pytest.approx(wanted, rel=0.02)
    assert 2.5 < found[3.0] < 3.5


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["model.router.kind=relu", *BUDGETS], "model.router.budgets=[1.0, 1.5, 3.0]: the relu router cannot change"),
        ([*TOP_P, "model.router.budgets=[2]"], "model.router.budgets=[2.0]: must be at least two numbers"),
        ([*TOP_P, "model.router.budgets=[3,2]"], "must be at least two numbers in ascending order"),
        ([*TOP_P, "model.router.budgets=[0,2]"], "model.router.budgets=0.0: is too small"),
        ([*TOP_P, "model.router.budgets=[0.5,2]"], "exceeds the possible experts per token (1 to 16)"),
        ([*TOP_P, "model.router.max_experts=2"], "exceeds the possible experts per token (1 to 2)"),
        ([*TOP_P, "budget.method=none"], "budget.method='none': does not hold several model.router.budgets; use pi"),
        ([*TOP_P, "budget.experts_per_token=4"], "budget.experts_per_token=4.0: is outside the range"),
        ([*TOP_P, "budget.start=3", "budget.over_steps=9"], "budget.start=3.0: has no meaning"),
        (TOP_P[:-1], "budget.experts_per_token=None: is needed"),
        (["model.router.kind=top_k", *BUDGETS], "a token takes a whole number of experts"),
        (["model.router.kind=top_k", "model.moe.experts_by_layer=[4,8,8,8]", "model.router.budgets=[1,6]",
          "budget.experts_per_token=2"], "model.router.budgets=6.0: is more than there are experts"),
        ([*TOP_P, "model.moe.max_mean_experts_per_token=2"], "a budget of 3 experts per token would exceed it"),
        (["model.router.kind=top_any", "adaptation.interval=2", "budget.method=pi", *BUDGETS], "adaptation.interval=2"),
    ],
)  # fmt: skip
def test_budgets_that_do_not_fit_are_named(overrides, named):
    with pytest.raises(ConfigError) as error:
        load_config(None, overrides)
    assert named in str(error.value)


def test_top_k_without_a_method_leaves_its_biases_alone():
    config = load_config(None, ["model.router.kind=top_k", "model.router.budgets=[1,2]", "budget.experts_per_token=2"])
    layer = MoELayer(config.model, 0, 0, MoEContext())
    train_steps(config, [layer], lambda step: layer(torch.randn(1, 50, 256)), 3)
    assert not layer.router.bias_E.any()
    assert config.model.router.expected_experts == 1.5


@pytest.mark.parametrize("overrides", [TOP_P, ["model.router.kind=top_k", "model.router.budgets=[1,2,3]",
                                               "budget.experts_per_token=2"]], ids=["top_p", "top_k"])  # fmt: skip
def test_an_export_runs_at_every_budget(corpus_dir, tmp_path, away_from_the_hub, overrides):
    run = begin(corpus_dir, tmp_path / "run", [*overrides, "model.router.lr_factor=1"])
    export(run.path, tmp_path / "out")
    tokens = some_tokens()
    seen = []
    for wanted in (1, 3, 2):
        overridden = {"experts_per_token": wanted}
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", trust_remote_code=True, router_overrides=overridden
        )
        run.decoder.context.aim(wanted)
        logits, maps = run_decoder(run.decoder, tokens)
        torch.testing.assert_close(model(tokens).logits, logits, rtol=1e-4, atol=1e-5)
        seen.append(sum(own.sum() for own in maps))
    assert seen[0] < seen[2] < seen[1]
    with pytest.raises(ValueError, match=r"router_overrides.experts_per_token=9: is outside the range"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", trust_remote_code=True, router_overrides={"experts_per_token": 9}
        )
    number = "p" if run.config.model.router.has_field("p") else "k"
    with pytest.raises(
        ValueError, match=rf"^router_overrides.{number}=1: .* has no such setting; use .*experts_per_token"
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True, router_overrides={number: 1})


@pytest.fixture(scope="module", params=["deepspeed", pytest.param("megatron", marks=pytest.mark.slow)])
def trained(request, corpus_dir, tmp_path_factory):
    """A run of the engine with several budgets, and one with a single one."""
    runs = tmp_path_factory.mktemp("budgets") / "runs"
    fields = [
        "model.router.min_experts=1",
        "model.moe.active_at_start=4",
        "adaptation.interval=0",
        "adaptation.window=1",
    ]
    if request.param == "megatron":
        fields += MEGATRON
    several = TrainingProcess(corpus_dir, runs, *fields, *BUDGETS, "run.name=several")
    assert several.wait() == 0, several.output()
    single = TrainingProcess(corpus_dir, runs, *fields, "budget.experts_per_token=1.5", "run.name=single")
    assert single.wait() == 0, single.output()
    return runs


def call(monkeypatch, main, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["tool", *map(str, arguments)])
    main()


def test_one_checkpoint_is_scored_at_several_budgets_and_drawn_next_to_another(trained, monkeypatch, capsys):
    several = trained / "several"
    call(monkeypatch, evaluate.main, several, "--experts-per-token", 1, 2, 3, "--device", "cpu")
    found = json.loads((several / "evaluations" / "step_00000040_budgets.json").read_text())["budgets"]
    assert [own["experts_per_token"] for own in found] == [1, 2, 3]
    experts = [own["scores"][f"eval/domains/prepared/{EXPERTS}"] for own in found]
    assert experts[0] < experts[1] < experts[2]
    assert "eval/domains/prepared/loss" not in (several / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match=r"single: was not evaluated; run python -m dynmoe.evaluate"):
        call(monkeypatch, report, "budget", several, trained / "single")
    call(monkeypatch, evaluate.main, trained / "single", "--device", "cpu")
    capsys.readouterr()
    call(monkeypatch, report, "budget", several, trained / "single")
    assert f"Scores by experts per token: {several / 'budget.html'}" in capsys.readouterr().out
    page = (several / "budget.html").read_text()
    for own in found:
        assert f"<td>{own['scores'][f'eval/domains/prepared/{EXPERTS}']:.3f}</td>" in page
        assert f"<td>{own['scores']['eval/domains/prepared/loss']:.4f}</td>" in page
    assert page.count("<td>single</td>") == 2  # loss and perplexity


def test_generation_uses_the_budget(trained, monkeypatch, capsys):
    counted = []
    for wanted in (1, 3):
        call(
            monkeypatch, generate.main, trained / "several", "--prompt", "the", "--tokens", 5, "--show-experts",
            "--experts-per-token", wanted, "--device", "cpu",
        )  # fmt: skip
        shown = capsys.readouterr().out
        counted.append(sum(float(part.split("]")[0]) for part in shown.split("[")[1:]))
    assert counted[0] < counted[1]
    model = open_trained(trained / "several", torch.device("cpu"))
    assert model.decoder.context.step.target_experts == 1.5


def test_budgets_that_a_checkpoint_does_not_have_are_refused(trained, monkeypatch):
    with pytest.raises(ConfigError, match=r"--experts-per-token=4.0: is outside the range of model.router.budgets"):
        call(monkeypatch, evaluate.main, trained / "several", "--experts-per-token", 1, 4)
    with pytest.raises(ConfigError, match=r"--experts-per-token=2.0: the model was trained with one budget"):
        call(monkeypatch, evaluate.main, trained / "single", "--experts-per-token", 2)
    with pytest.raises(ConfigError, match=r"--experts-per-token=0.5: is outside the range"):
        call(monkeypatch, generate.main, trained / "several", "--experts-per-token", 0.5)
