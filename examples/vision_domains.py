"""Do experts help on images of an unseen domain? DomainBed's question (arXiv 2007.01434) on scikit-learn's digits.

python examples/vision_domains.py trains a small vision transformer on all domains but one and tests it on that one, for
each domain in turn. It compares top-any with adaptation (DynMoE, arXiv 2405.14297) to top-2 with a cosine router (GMoE,
arXiv 2206.04046), with the same number of experts per token. With the same seed, both start from the same weights
outside the experts and see the same images in the same order.
"""

import argparse
import copy
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from multiprocessing import get_context
from statistics import mean
from typing import NamedTuple

import cosine_router  # noqa: F401 (registers the router)
import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor
from vit_digits import PATCH, ViT

from dynmoe.config import Config, load_config
from dynmoe.engines.deepspeed_state import OptimizerState
from dynmoe.engines.runtime import MoERuntime
from dynmoe.moe import MoEContext, MoELayer
from dynmoe.moe.layer import capture_plans
from dynmoe.train.optimizer import parameter_groups

SHARED = [
    "model.layers=2", "model.hidden=64", "model.heads=4", "model.moe.expert_hidden=64", "optimizer.weight_decay=0.05",
]  # fmt: skip
ROUTERS = {
    "top-2": ["model.moe.experts=6", "model.router.kind=cosine_top_k", "model.router.k=2"],
    "top-any": [
        "model.moe.experts=8", "model.moe.active_at_start=6", "model.router.kind=top_any",
        "model.router.variant=improved", "budget.method=pi", "budget.experts_per_token=2",
        "adaptation.interval=50", "adaptation.window=25", "adaptation.removal_share=0.1",
    ],
}  # fmt: skip
PATCHES = (8 // PATCH) ** 2
VALIDATION = 0.2
BATCH = 64
RATE = 3e-3


class Images(NamedTuple):
    """Images and the digits that they show."""

    images_N88: Tensor
    labels_N: Tensor

    def part(self, chosen: Tensor | slice) -> "Images":
        return Images(self.images_N88[chosen], self.labels_N[chosen])


def rotated(images_N88: Tensor, degrees: float) -> Tensor:
    """Rotates counterclockwise, with zeros from outside the image."""
    angle = torch.tensor(degrees).deg2rad()
    rows = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    grid = F.affine_grid(F.pad(rows, (0, 1)).expand(len(images_N88), 2, 3), [len(images_N88), 1, 8, 8], False)
    return F.grid_sample(images_N88[:, None], grid, align_corners=False)[:, 0]


def noisy(images_N88: Tensor, deviation: float) -> Tensor:
    """Adds normal noise, the same in every call."""
    noise_N88 = torch.randn(images_N88.shape, generator=torch.Generator().manual_seed(0))
    return (images_N88 + deviation * noise_N88).clamp(0, 1)


DOMAINS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": torch.clone,
    "rotated": partial(rotated, degrees=45.0),
    "noisy": partial(noisy, deviation=0.2),
    "inverted": lambda images_N88: 1 - images_N88,
}


def make_domains() -> dict[str, Images]:
    """The digits, each in one of the domains only."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    parts = order.tensor_split(len(DOMAINS))
    return {name: Images(DOMAINS[name](images[own]), labels[own]) for name, own in zip(DOMAINS, parts, strict=True)}


def split(domain: Images) -> tuple[Images, Images]:
    """Images for training and for validation."""
    count = round(len(domain.labels_N) * (1 - VALIDATION))
    return domain.part(slice(count)), domain.part(slice(count, None))


def pooled(domains: Iterable[Images]) -> Images:
    return Images(*map(torch.cat, zip(*domains, strict=True)))


class Job(NamedTuple):
    """One training with a domain held out."""

    router: str
    domain: str
    seed: int
    steps: int


class Outcome(NamedTuple):
    """The selected model: accuracies, experts per token, FLOPs of its training.

    ``experts`` is by domain: on all images of the one that was held out, on the validation images of the others.
    ``flops`` and ``trained_experts`` are of the whole training, ``in_use`` is the mean number of experts of a layer.
    """

    accuracy: float
    validation: float
    step: int
    experts: dict[str, float]
    flops: float
    trained_experts: float
    in_use: float


class Training:
    """A vision transformer in one process, with the runtime that every engine of ours uses."""

    def __init__(self, config: Config, seed: int) -> None:
        torch.manual_seed(seed)
        context = MoEContext()
        self.model = ViT(config, context, MoELayer)
        self.layers = [block.moe for block in self.model.blocks]
        self.adam = torch.optim.AdamW(parameter_groups(self.model, config), lr=RATE)
        state = OptimizerState(self.adam, self.adam)
        self.runtime = MoERuntime(
            config, self.layers, context, state, self.model.named_parameters(), torch.device("cpu")
        )
        self.rows = 0
        self.images = 0

    def step(self, number: int, steps: int, batch: Images) -> None:
        """Trains on a batch; ``number`` is from 1 to ``steps``."""
        self.model.train()
        self.runtime.calibrate(lambda: self.model(batch.images_N88))
        for group in self.adam.param_groups:
            group["lr"] = RATE * min(1.0, number / 50, (steps - number + 1) / (0.5 * steps)) * group["lr_factor"]
        with self.runtime.step(number, loss_scale=1.0):
            self.adam.zero_grad()
            F.cross_entropy(self.model(batch.images_N88), batch.labels_N).backward()
        self.adam.step()
        self.runtime.apply_step(number)
        self.rows += sum(self.runtime.report().routed_rows.values())
        self.images += len(batch.labels_N)

    @torch.no_grad()
    def test(self, own: Images) -> tuple[float, float]:
        """Accuracy, and mean experts per token over all layers."""
        with capture_plans(self.layers) as plans:
            logits_NC = self.model.eval()(own.images_N88)
        experts = mean(plan.experts_per_token_T.float().mean().item() for plan in plans)
        return (logits_NC.argmax(dim=1) == own.labels_N).float().mean().item(), experts

    @property
    def experts_per_token(self) -> float:
        """Of the training so far."""
        return self.rows / (self.images * PATCHES * len(self.layers))

    @property
    def flops(self) -> float:
        """Of all matrix products of the training so far, from the rows that experts computed.

        As in ``ModelSize.flops``: forward and backward, two per multiply-add. Attention is over all patches.
        """
        matrices = {name: p for name, p in self.model.named_parameters() if p.dim() > 1 and ".experts." not in name}
        once = self.model.head.weight.numel()
        each = sum(p.numel() for p in matrices.values()) - once - self.model.positions.numel()
        hidden = self.model.head.in_features
        attention = 2 * len(self.layers) * PATCHES * hidden
        expert = sum(p[0].numel() for p in self.layers[0].experts.parameters())
        return 6 * (self.images * (PATCHES * (each + attention) + once) + self.rows * expert)


def train(job: Job) -> Outcome:
    """Trains on all domains but one, selects the model on validation images of these domains, and tests it."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    domains = make_domains()
    held_out = domains.pop(job.domain)
    parts = {name: split(own) for name, own in domains.items()}
    learn = pooled(own for own, _ in parts.values())
    validation = pooled(own for _, own in parts.values())
    config = load_config(None, [*SHARED, *ROUTERS[job.router], f"train.steps={job.steps}", f"train.seed={job.seed}"])
    training = Training(config, job.seed)
    torch.manual_seed(job.seed)  # the same images in the same order for both routers
    best: tuple[float, int, dict[str, Tensor]] = (-1.0, 0, {})
    for step in range(1, job.steps + 1):
        batch = learn.part(torch.randint(len(learn.labels_N), (BATCH,)))
        training.step(step, job.steps, batch)
        if step % 25 == 0 or step == job.steps:
            accuracy, _ = training.test(validation)
            if accuracy >= best[0]:
                best = (accuracy, step, copy.deepcopy(training.model.state_dict()))
    training.model.load_state_dict(best[2])
    accuracy, unseen = training.test(held_out)
    experts = {name: training.test(own)[1] for name, (_, own) in parts.items()} | {job.domain: unseen}
    in_use = mean(int(layer.router.active_E.sum()) for layer in training.layers)
    return Outcome(accuracy, best[0], best[1], experts, training.flops, training.experts_per_token, in_use)


def values(numbers: list[float], digits: int = 3, sign: str = "") -> str:
    """The mean, and each value."""
    each = " ".join(f"{number:{sign}.{digits}f}" for number in numbers)
    return f"{mean(numbers):{sign}.{digits}f} ({each})"


def print_table(*columns: str, rows: Iterable[list[str]]) -> None:
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def report(outcomes: dict[Job, Outcome], domains: list[str], seeds: int) -> None:
    """Prints accuracies on unseen domains, experts per token by domain, and the cost of the training."""

    def of(router: str, domain: str) -> list[Outcome]:
        return [own for job, own in outcomes.items() if (job.router, job.domain) == (router, domain)]

    def compared(name: str, both: list[list[float]]) -> list[str]:
        paired = [second - first for first, second in zip(*both, strict=True)]
        return [name, *map(values, both), values(paired, sign="+")]

    accuracies = {domain: [[own.accuracy for own in of(router, domain)] for router in ROUTERS] for domain in domains}
    rows = [compared(domain, both) for domain, both in accuracies.items()]
    by_router = zip(*accuracies.values(), strict=True)
    means = [[mean(own[seed] for own in by_domain) for seed in range(seeds)] for by_domain in by_router]
    print_table("unseen domain", *ROUTERS, "difference", rows=[*rows, compared("mean", means)])

    def seen(domain: str, seed: int) -> float:
        """Experts per token of top-any on a domain, mean over the models that were trained on it."""
        others = [of("top-any", other)[seed] for other in domains if other != domain]
        return mean(own.experts[domain] for own in others)

    experts = {domain: [own.experts[domain] for own in of("top-any", domain)] for domain in domains}
    if len(domains) > 1:
        rows = [
            compared(domain, [[seen(domain, seed) for seed in range(seeds)], own]) for domain, own in experts.items()
        ]
        print_table("experts per token of top-any on", "seen in training", "unseen", "difference", rows=rows)

    for router in ROUTERS:
        own = [outcome for job, outcome in outcomes.items() if job.router == router]
        cost = {field: [getattr(one, field) for one in own] for field in ("trained_experts", "flops", "in_use")}
        low, high = (limit(cost["trained_experts"]) for limit in (min, max))
        print(
            f"{router}: {mean(cost['flops']):.4g} FLOPs per training, {low:.3f} to {high:.3f} experts per token in "
            f"training, {mean(cost['in_use']):.1f} experts in use per layer"
        )
    ratios = [
        of("top-any", domain)[seed].flops / of("top-2", domain)[seed].flops
        for domain, seed in product(domains, range(seeds))
    ]
    print(f"FLOPs of top-any relative to top-2: {min(ratios):.4f} to {max(ratios):.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domains", nargs="+", choices=DOMAINS, default=list(DOMAINS), help="held out; default: each")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--steps", type=int, default=600, help="training steps")
    parser.add_argument("--processes", type=int, default=2, help="models that are trained at the same time")
    given = parser.parse_args()
    jobs = [Job(*own, given.steps) for own in product(ROUTERS, given.domains, range(given.seeds))]
    outcomes = {}
    with ProcessPoolExecutor(given.processes, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        for job, own in zip(jobs, pool.map(train, jobs), strict=True):
            outcomes[job] = own
            print(
                f"{job.router}, {job.domain} unseen, seed {job.seed}: test accuracy {own.accuracy:.3f} "
                f"(validation {own.validation:.3f}, step {own.step}), experts per token in training "
                f"{own.trained_experts:.3f}, on the unseen domain {own.experts[job.domain]:.3f}",
                flush=True,
            )
    report(outcomes, given.domains, given.seeds)


if __name__ == "__main__":
    main()
