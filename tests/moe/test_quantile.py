"""The state of quantile routers from step to step, and what training and evaluation compare with."""

from __future__ import annotations

import pytest
import torch

from dynmoe.config import load_config
from dynmoe.moe import MoEContext, StepState
from dynmoe.moe.budget import Budget
from dynmoe.moe.router import Router
from dynmoe.routing.update_statistics import UpdateStatisticsSpec, pack_update_statistics, unpack_update_statistics

HIDDEN = 64
EXPERTS = 16
K = 2.0
TOKENS = 4096
WANTED = UpdateStatisticsSpec(histogram=True)


class Run:
    """A router (``quantile`` unless given) on stationary inputs that share a direction, so that its experts differ."""

    def __init__(self, *overrides: str) -> None:
        fields = [f"model.hidden={HIDDEN}", f"model.moe.experts={EXPERTS}", f"budget.experts_per_token={K}"]
        config = load_config(None, ["model.router.kind=quantile", *fields, *overrides])
        self.context = MoEContext(step=StepState(target_experts=K))
        self.router = Router(config.model, EXPERTS, 0, "router", self.context).train()
        self.budget = Budget(config)
        self.generator = torch.Generator().manual_seed(1)
        self.direction = torch.randn(HIDDEN, generator=self.generator)

    def tokens(self, number: int = TOKENS) -> torch.Tensor:
        return self.direction + torch.randn(number, HIDDEN, generator=self.generator).exp()

    @torch.no_grad()
    def calibrate(self) -> None:
        with self.context.override(calibrating=True):
            self.router(self.tokens())

    @torch.no_grad()
    def step(self, micro_batches: int = 1):
        """The plan of the last micro-batch."""
        sums = 0
        for x_TD in self.tokens().chunk(micro_batches):
            plan = self.router(x_TD)
            spec = self.router.spec
            sums = sums + pack_update_statistics(plan, x_TD, None, WANTED, spec.histogram_EC(self.router, plan))
        self.budget.update([self.router], [unpack_update_statistics(sums, EXPERTS, WANTED)], 1)
        return plan

    def state(self) -> dict[str, torch.Tensor]:
        return {name: buffer.clone() for name, buffer in self.router.named_buffers()}


def load_error(plan) -> float:
    load_E = plan.tokens_per_expert_E.double()
    wanted = len(plan.gates_TE) * K / EXPERTS
    return ((load_E - wanted).abs().max() / wanted).item()


@torch.no_grad()
@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_every_pass_has_the_exact_load_whatever_the_scale_of_logits(scale):
    """A pass of 4,096 tokens gives each of 16 experts 512: within 2 %, from the first pass on."""
    run = Run()
    run.router.weight_ED.mul_(scale)
    run.calibrate()
    for _ in range(3):
        plan = run.step()
        assert load_error(plan) <= 0.02
        assert plan.experts_per_token_T.double().mean().item() == pytest.approx(K, rel=0.02)


@torch.no_grad()
@pytest.mark.parametrize("thresholds", ["batch", "running"])
def test_evaluation_keeps_the_budget_and_does_not_look_at_other_tokens(thresholds):
    run = Run(f"model.router.thresholds={thresholds}")
    run.calibrate()
    for _ in range(30):
        run.step()
    router = run.router.eval()
    x_TD = run.tokens(65536)
    plan = router(x_TD)
    assert plan.experts_per_token_T.double().mean().item() == pytest.approx(K, rel=0.02)
    assert load_error(plan) <= 0.05
    assert torch.equal(router(x_TD[:7]).routing_map_TE, plan.routing_map_TE[:7])


@torch.no_grad()
def test_running_thresholds_are_causal_in_training_and_batch_thresholds_are_not():
    for thresholds, causal in (("running", True), ("batch", False)):
        run = Run(f"model.router.thresholds={thresholds}")
        run.calibrate()
        assert run.router.spec.selects_among == ("token" if causal else "batch")
        x_TD = run.tokens()
        before = run.router(x_TD).routing_map_TE[:100]
        x_TD[100:] *= 3.0
        assert torch.equal(run.router(x_TD).routing_map_TE[:100], before) == causal


@torch.no_grad()
def test_running_thresholds_hold_the_budget_in_training():
    run = Run("model.router.thresholds=running")
    run.calibrate()
    observed = [run.step().experts_per_token_T.double().mean().item() for _ in range(30)]
    assert sum(observed) / 30 == pytest.approx(K, rel=0.02)


@torch.no_grad()
def test_the_first_batch_sets_the_thresholds_once():
    run = Run()
    generator = run.generator.get_state()
    run.calibrate()
    assert run.router.is_calibrated
    run.generator.set_state(generator)
    logits_TE = run.router.spec.logits_TE(run.router, run.tokens())
    exact_E = logits_TE.sort(dim=0, descending=True).values[int(TOKENS * K / EXPERTS)]
    torch.testing.assert_close(run.router.offset_E, exact_E)
    run.calibrate()
    torch.testing.assert_close(run.router.offset_E, exact_E)


@torch.no_grad()
def test_state_does_not_depend_on_micro_batches():
    """The moving averages are of a whole step."""
    whole, parts = Run(), Run()
    for run, number in ((whole, 1), (parts, 4)):
        run.calibrate()
        for _ in range(3):
            run.step(number)
    for name, value in whole.state().items():
        torch.testing.assert_close(parts.state()[name], value, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_thresholds_are_moving_averages_of_a_sort():
    run = Run("model.router.cutoff_decay=0.75")
    run.calibrate()
    before = run.router.offset_E.clone()
    generator = run.generator.get_state()
    run.step()
    run.generator.set_state(generator)
    logits_TE = run.router.spec.logits_TE(run.router, run.tokens())
    exact_E = logits_TE.sort(dim=0, descending=True).values[int(TOKENS * K / EXPERTS) - 1]
    deviation_E = logits_TE.std(dim=0)
    expected_E = 0.75 * before + 0.25 * exact_E
    assert ((run.router.offset_E - expected_E).abs() <= 0.01 * deviation_E).all()


@pytest.mark.parametrize("deviation", [0.2, 6.0])
def test_expert_thresholds_hold_the_budget_with_large_logits_too(deviation):
    """Scores of large logits differ by less than the bins of a histogram of scores would tell apart."""
    run = Run("model.router.kind=expert_threshold")
    with torch.no_grad():
        logits_TE = run.tokens() @ run.router.weight_ED.t()
        run.router.weight_ED.mul_(deviation / logits_TE.std())
    run.calibrate()
    loads = torch.stack([run.step().tokens_per_expert_E.double() for _ in range(60)])[20:]
    assert loads.sum(dim=1).mean() / TOKENS == pytest.approx(K, rel=0.02)
    assert (loads.mean(dim=0) / (TOKENS * K / EXPERTS) - 1).abs().max() < 0.1


def test_a_cutoff_of_1_still_lets_tokens_with_the_largest_logits_pass():
    run = Run("model.router.kind=expert_threshold")
    run.router.offset_E.fill_(1.0)
    run.router.weight_ED.data.fill_(1.0)
    plan = run.router.eval()(torch.full((3, HIDDEN), 1.0))
    assert plan.routing_map_TE.all()
