"""The standalone examples work; examples of an engine or of traces are tested next to those."""

from __future__ import annotations

import importlib
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch.utils.flop_counter import FlopCounterMode

from dynmoe.config import load_config
from dynmoe.moe import MoEContext, MoELayer
from dynmoe.routers import ROUTERS
from harness.processes import CPU, ROOT


def run_example(*command: str, timeout_s: float, cwd: Path = ROOT) -> str:
    done = subprocess.run(
        [sys.executable, *command], cwd=cwd, check=False, text=True, capture_output=True, timeout=timeout_s,
        env=os.environ | CPU | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_our_layer_in_a_plain_model():
    said = run_example("examples/your_own_layer.py", timeout_s=120)
    losses = [float(value) for value in re.findall(r"loss ([\d.]+)", said)]
    experts = [float(value) for value in re.findall(r"([\d.]+) experts per token", said)]
    assert losses[-1] < losses[0] / 5
    assert all(1 < count < 8 for count in experts)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_vision_model_reads_digits_while_experts_are_added_and_removed(ranks):
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--rdzv-backend", "c10d",
                "--rdzv-endpoint", "127.0.0.1:0"] if ranks > 1 else []  # fmt: skip
    said = run_example(*launcher, "examples/vit_digits.py", timeout_s=600)
    accuracy = re.search(r"test accuracy ([\d.]+) on 360 unseen digits", said)
    assert accuracy is not None, said
    assert float(accuracy[1]) >= 0.97
    in_use = re.findall(r"in use (\[.*\])", said)
    assert in_use[0] != in_use[-1], "no expert was added or removed"


@pytest.fixture(scope="module")
def example() -> Iterator[Callable[[str], ModuleType]]:
    """Imports an example as the others do; none of them, nor its router, is left for other tests."""
    before = set(sys.modules)
    routers = dict(ROUTERS)
    sys.path.insert(0, str(ROOT / "examples"))
    yield importlib.import_module
    sys.path.remove(str(ROOT / "examples"))
    ROUTERS.clear()
    ROUTERS.update(routers)
    for name in set(sys.modules) - before:
        if (ROOT / "examples" / f"{name}.py").exists():
            del sys.modules[name]


@pytest.fixture
def own_group() -> Iterator[None]:
    """A process group of this process alone, unless an earlier test left one."""
    if dist.is_initialized():
        assert dist.get_world_size() == 1
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_brackets_are_closed_or_not(example):
    is_closed = example("code_tasks").is_closed
    assert is_closed(("f(a[0],", "  {1: (2, 3)})"))
    assert is_closed(("no bracket",))
    assert not is_closed(("f(a[0]",))
    assert not is_closed(("f(a[0)]",))
    assert not is_closed((")(",))


def test_lines_are_swapped_within_their_indentation(example):
    tasks = example("code_tasks")
    passage = ("if x:", "    a = 1", "    b = 2", "c = 3")
    swapped = {tasks.swap_lines(passage, random.Random(seed)) for seed in range(20)}
    assert swapped == {("c = 3", "    a = 1", "    b = 2", "if x:"), ("if x:", "    b = 2", "    a = 1", "c = 3")}
    assert tasks.swap_lines(("if x:", "    a = 1", "        b = 2"), random.Random(0)) is None
    assert tasks.swap_lines(("pass", "pass"), random.Random(0)) is None


def test_one_closing_bracket_is_removed(example):
    remove = example("code_tasks").remove_bracket
    assert {remove(("f(a[0])",), random.Random(seed)) for seed in range(20)} == {("f(a[0)",), ("f(a[0]",)}
    assert remove(("f(a[0]",), random.Random(0)) is None
    assert remove(("pass",), random.Random(0)) is None


def test_code_docstrings_and_comments_are_separated(example):
    source = '"""Says\nit."""\n\n# a comment\ndef f(x):\n    \'\'\'Of f.\'\'\'\n    return "text"  # kept\n'
    code, prose = example("code_tasks").separate(source)
    assert [line for line in code if line] == ["def f(x):", '    return "text"  # kept']
    assert prose == ["Says", "it.", "Of f."]


def test_no_file_is_in_both_splits_and_labels_are_right(example):
    tasks = example("code_tasks")
    learn, held_out = set(tasks.files(False)), set(tasks.files(True))
    assert not learn & held_out
    assert len(learn) > len(held_out) > 50
    assert set(tasks.read(True).code) == held_out
    for test in (False, True):
        split = tasks.read(test)
        of_file = {"\n".join(passage): path for path, own in split.code.items() for passage in own}
        prose = {"\n".join(passage) for own in split.prose.values() for passage in own}
        for task, (_, labels, _) in tasks.TASKS.items():
            found = tasks.samples(task, test, 200)
            assert Counter(own["label"] for own in found) == dict.fromkeys(range(labels), 200 // labels)
            assert len({own["text"] for own in found}) == 200, "a passage occurs twice"
            assert found == tasks.samples(task, test, 200)
            for own in found:
                text, label = own["text"], own["label"]
                assert (text in of_file) == (label == 0 or task == "package"), (task, text)
                if task == "kind":
                    assert (text in prose) == (label == 1)
                elif task == "package":
                    assert sum(of_file[text].parts[0] == package for package in tasks.PACKAGES) == 1
                    assert tasks.PACKAGES.index(of_file[text].parts[0]) == label
                elif task == "bracket":
                    assert tasks.is_closed(text.split("\n")) == (label == 0)


def test_the_verdict_needs_every_pair_in_every_seed(example):
    verdict = example("finetune_classification").verdict
    hardness = {"middle": 0.5, "easy": 0.1, "hard": 0.9}
    rising = {"easy": [1.0, 2.0, 3.0], "middle": [1.1, 2.5, 3.1], "hard": [1.2, 2.6, 3.2]}
    assert verdict(hardness, rising) == "seen (the harder task uses more in 3, 3, 3 of 3 pairs, by seed)"
    rising["hard"] = [1.2, 2.4, 3.2]
    assert verdict(hardness, rising).startswith("not seen at this size (the harder task uses more in 3, 2, 3 of 3")
    one_seed = {task: experts[:1] for task, experts in rising.items()}
    assert verdict(hardness, one_seed).startswith("too few tasks or seeds for a verdict (the harder")
    assert example("finetune_classification").difficulty("package", 0.2) == pytest.approx(1.0)
    assert example("finetune_classification").difficulty("kind", 0.75) == pytest.approx(0.5)


def test_each_digit_is_in_one_domain_changed_as_its_name_says(example):
    vision = example("vision_domains")
    digits = load_digits()
    known = {tuple(image.flatten() / 16) for image in digits.images}
    assert len(known) == len(digits.images), "equal images cannot be told apart"
    plain = vision.make_domains()["plain"]
    assert all(tuple(image.flatten().tolist()) in known for image in plain.images_N88.double())
    inverted = vision.make_domains()["inverted"]
    assert all(tuple((1 - image.double()).flatten().tolist()) in known for image in inverted.images_N88)
    assert sum(len(own.labels_N) for own in vision.make_domains().values()) == len(digits.images)

    unchanged = dict.fromkeys(vision.DOMAINS, torch.clone)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vision, "DOMAINS", unchanged)
        images = torch.cat([own.images_N88 for own in vision.make_domains().values()])
        labels = torch.cat([own.labels_N for own in vision.make_domains().values()])
    right = {tuple(image.flatten() / 16): label for image, label in zip(digits.images, digits.target, strict=True)}
    found = {tuple(i.flatten().tolist()): int(label) for i, label in zip(images.double(), labels, strict=True)}
    assert found == right

    learn, validation = vision.split(plain)
    assert torch.equal(torch.cat([learn.images_N88, validation.images_N88]), plain.images_N88)
    assert len(validation.labels_N) == pytest.approx(0.2 * len(plain.labels_N), abs=1)


def test_images_are_rotated_counterclockwise_and_noise_has_its_deviation(example):
    vision = example("vision_domains")
    image = torch.rand(1, 8, 8)
    torch.testing.assert_close(vision.rotated(image, 90.0)[0], torch.rot90(image[0]), rtol=0, atol=1e-5)
    gray = torch.full((200, 8, 8), 0.5)
    noise = vision.noisy(gray, 0.1) - gray
    assert noise.std().item() == pytest.approx(0.1, rel=0.03)
    assert torch.equal(vision.noisy(gray, 0.1), gray + noise)


def test_the_cosine_router_selects_by_cosines(example):
    example("cosine_router")
    fields = ["model.hidden=16", "model.moe.experts=4", "model.router.kind=cosine_top_k", "model.router.k=2"]
    layer = MoELayer(load_config(None, fields).model, layer=0, seed=0, context=MoEContext())
    x_TD = torch.randn(5, 16)
    plan = layer.router(x_TD)
    state = dict(layer.router.named_parameters())
    for x_D, gates_E in zip(x_TD, plan.gates_TE, strict=True):
        projected = state["project_PD"] @ x_D
        cosines = [projected @ w / projected.norm() / w.norm() for w in state["embeddings_PE"].T]
        shares = torch.stack([2 * cosine for cosine in cosines]).softmax(dim=0)
        assert gates_E.count_nonzero() == 2
        torch.testing.assert_close(gates_E, shares.where(shares >= shares.sort().values[-2], 0.0))
    layer(x_TD).sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in state.values())


def vision_training(vision: ModuleType, router: str):
    return vision.Training(load_config(None, [*vision.SHARED, *vision.ROUTERS[router], "train.seed=3"]), 3)


def test_routers_start_from_the_same_weights_outside_the_experts(example):
    vision = example("vision_domains")
    models = [dict(vision_training(vision, router).model.named_parameters()) for router in vision.ROUTERS]
    shared = [name for name in models[0] if ".moe." not in name]
    assert len(shared) > 10
    assert all(torch.equal(models[0][name], models[1][name]) for name in shared)


def test_flops_are_those_that_torch_counts(example, own_group):
    vision = example("vision_domains")
    training = vision_training(vision, "top-2")
    with FlopCounterMode(display=False) as counter:
        training.step(1, 100, vision.make_domains()["plain"].part(slice(64)))
    layers = 2
    images = 64
    patches = 16
    hidden = width = 64
    assert training.rows == layers * images * patches * 2
    # What torch does not count: fused attention, and the products of our experts.
    attention = layers * images * patches * patches * hidden * 2
    experts = training.rows * 3 * hidden * width
    unneeded = 2 * images * patches * 4 * hidden  # the gradient of the pixels
    assert training.flops == counter.get_total_flops() + 6 * (attention + experts) + unneeded


@pytest.mark.slow
def test_a_vision_model_reads_digits_of_an_unseen_domain_at_equal_cost():
    options = ["--domains", "plain", "--seeds", "1", "--processes", "1"]
    said = run_example("examples/vision_domains.py", *options, timeout_s=600)
    accuracies = re.findall(r"plain unseen, seed 0: test accuracy ([\d.]+)", said)
    assert len(accuracies) == 2
    assert min(map(float, accuracies)) > 0.5
    low, high = (float(ratio) for ratio in re.search(r"relative to top-2: ([\d.]+) to ([\d.]+)", said).groups())
    assert 0.99 <= low <= high <= 1.01


@pytest.mark.slow
def test_a_vision_language_model_answers_questions_in_three_stages(tmp_path):
    """Short settings, about unseen pairs: in stage 2, all kinds of questions but relations are learned."""
    page = tmp_path / "view" / "tokens.html"
    said = run_example(
        "examples/vision_language.py", "--compare", "--scenes", "3000", "--steps", "400", "100", "20", "400", "60",
        "--output", str(page), timeout_s=1800,
    )  # fmt: skip
    assert float(re.search(r"known pairs, ([\d.]+) of unseen pairs", said)[1]) > 0.95
    stages = dict(re.findall(r"(Stage \d, [^:]+): ([\d.]+) of the answers right", said))
    assert list(stages) == ["Stage 1, the projector", "Stage 2, dense", "Stage 3, top-any", "Stage 3, top-2"]
    assert float(stages["Stage 1, the projector"]) < 0.5
    assert float(stages["Stage 2, dense"]) > 0.7
    assert float(stages["Stage 3, top-any"]) > 0.75
    ratio = float(re.search(r"^\| 0 \|.*\| ([\d.]+) \|$", said, re.MULTILINE)[1])
    assert ratio == pytest.approx(1.0, abs=0.01)
    view = json.loads(page.with_suffix(".json").read_text())
    kinds = {row["name"]: row["count"] for row in view["tables"]["kinds"]}
    assert kinds["image"] == sum(image["rows"] * image["columns"] for image in view["images"]) > 0
    assert kinds["text"] > 0
    assert len({len(experts) for token in view["tokens"] for experts in token["experts"]}) > 1


@pytest.mark.slow
def test_exported_models_learn_to_classify(example, away_from_the_hub, tmp_path):
    """Runs in its own folder, where it creates models."""
    for name in ("train.py", "configs", "dynmoe", "data_prep"):
        (tmp_path / name).symlink_to(ROOT / name)
    options = ["--tasks", "kind", "package", "--seeds", "1"]
    said = run_example(str(ROOT / "examples" / "finetune_classification.py"), *options, cwd=tmp_path, timeout_s=1800)
    pattern = r"(\S+)_exported, (\w+), .* accuracy ([\d.]+), ([\d.]+) experts.* below ([\d.]+), .* above ([\d.]+)\)"
    found = re.findall(pattern, said)
    assert [name for name, *_ in found] == ["top_k_2", "top_k_1", "top_any", "top_any_at_2"] * 2
    for name, task, accuracy, *experts in found:
        assert float(accuracy) > {"kind": 0.8, "package": 0.3}[task]
        mean, low, high = (float(value) for value in experts)
        if name.startswith("top_k"):
            assert mean == low == high == int(name[-1])
        else:
            assert 1 <= low < mean < high <= 8
        if name == "top_any_at_2":
            assert mean == pytest.approx(2, rel=0.15)
    assert (
        len(re.findall(r"^Harder tasks use more experts, top_any\w* (?:before|after) fine-tuning: ", said, re.M)) == 4
    )

    finetuning = example("finetune_classification")
    exported = [tmp_path / "runs" / "finetune" / f"{name}_exported" for name in ("top_k_2", "top_any")]
    heads = [finetuning.load(finetuning.Job(path, "kind", 1, 0)).score.weight for path in exported]
    assert torch.equal(*heads), "heads of one seed differ"
    assert heads[0].std() > 0
