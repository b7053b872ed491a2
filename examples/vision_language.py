"""DynMoE's vision-language case at small scale: the three stages of MoE-LLaVA (arXiv 2401.15947), with top-any routing.

The model answers questions about pictures of coloured shapes (scenes.py). The recipe starts from a pretrained vision
encoder and a pretrained language model, so both are trained first: the encoder names what is in each cell, the language
model reads descriptions of scenes. Some pairs of colour and shape are held out from all training pictures, but not from
this text; the test asks about them. Then (1) only the projector is trained; (2) projector and language model, dense;
(3) experts start as copies of the feed-forward layers, and only the MoE layers are trained.

python examples/vision_language.py, or torchrun --nproc-per-node 2 examples/vision_language.py for two ranks.
--compare trains stage 3 with top-2 as well, to the same measured FLOPs. Seeds of stage 3 share one dense model.
"""

import argparse
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import scenes
import torch
import torch.distributed as dist
from scenes import Scene
from scipy import stats
from torch import Tensor
from vision_language_model import IDS, TOKENS, Encoder, VisionLanguageModel, never_together
from vision_language_training import EXPERTS, conversations, test, train, upcycle

from dynmoe.config import Config, load_config
from dynmoe.engines.deepspeed import make_context, start_processes
from dynmoe.moe.layer import capture_plans
from dynmoe.report.images import Image
from dynmoe.report.tokens import Document, view_documents, write_view
from dynmoe.routing import RoutingPlan

EACH = 3  # training questions of each kind about a picture
TEST = 500  # pictures
SHOWN = 12  # pictures of the token view
STEPS = (1200, 700, 60, 1300, 120)
DENSE = [
    "model.layers=4", "model.hidden=64", "model.heads=2", "model.kv_heads=2", "model.ffn_hidden=128",
    "model.qk_norm=head", "model.init_std=0.1", "model.moe.experts=0", "optimizer.lr=3e-3",
    "optimizer.weight_decay=0.1",
]  # fmt: skip
SPARSE = ["model.moe.experts=8", "model.moe.expert_hidden=128"]
ROUTERS = {
    "top-any": [
        "model.router.kind=top_any", "model.router.variant=improved", "model.moe.active_at_start=4",
        "budget.method=pi", f"budget.experts_per_token={EXPERTS}",
        "adaptation.interval=30", "adaptation.window=15", "adaptation.until=90", "adaptation.removal_share=0.1",
        "adaptation.weights=slot",
    ],
    "top-2": ["model.router.kind=top_k", "model.router.k=2", "model.router.renormalize=true"],
}  # fmt: skip


def decode(model: VisionLanguageModel, pictures: Tensor, tokens_BS: Tensor) -> list[RoutingPlan]:
    """The plans of the MoE layers for pictures and words."""
    device = next(model.parameters()).device
    with torch.no_grad(), capture_plans(model.decoder.moe_layers) as plans:
        model.logits(pictures.to(device), tokens_BS.to(device), torch.zeros_like(tokens_BS, dtype=torch.bool))
    return plans


def print_experts(model: VisionLanguageModel, pictures: Tensor, drawn: Sequence[Scene]) -> None:
    """Mean experts of cells and of words, by layer."""
    tokens_BS, _ = conversations(drawn, seed=0, described=False)
    for layer, plan in zip(model.decoder.moe_layers, decode(model, pictures, tokens_BS), strict=True):
        counts_BS = plan.experts_per_token_T.view(len(drawn), -1).float()
        cells = counts_BS[:, :TOKENS].mean().item()
        words = counts_BS[:, TOKENS:].mean().item()
        active = int(layer.router.active_E.sum())
        if dist.get_rank() == 0:
            print(f"  layer {layer.layer}: {cells:.2f} experts per cell, {words:.2f} per word, {active} in use")


def write_page(model: VisionLanguageModel, pictures: Tensor, drawn: Sequence[Scene], step: int, output: Path) -> None:
    """Writes the token view of pictures, each with its questions and answers."""
    documents = []
    for picture, scene in zip(pictures, drawn, strict=True):
        pieces = [f"{piece} " for own in scene.questions for piece in f"{own.text} {own.answer}.".split()]
        ids = [IDS[piece.rstrip(". ")] for piece in pieces]
        plans = decode(model, picture[None], torch.tensor([ids]))
        image = Image((picture.permute(1, 2, 0) * 255).round().to(torch.uint8), scenes.GRID, scenes.GRID)
        documents.append(Document("pictures of the test", ids, pieces, plans, image))
    layers = [layer.layer for layer in model.decoder.moe_layers]
    if dist.get_rank() == 0:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_view(view_documents(documents, "vision_language", step, layers), output)


@dataclass(frozen=True)
class Data:
    """Scenes, and their pictures; those of ``known`` are new, but of pairs that training has; ``text`` has none."""

    text: list[Scene]
    training: list[Scene]
    known: list[Scene]
    test: list[Scene]
    training_pictures: Tensor
    known_pictures: Tensor
    test_pictures: Tensor


def draw(number: int) -> Data:
    text = scenes.draw_scenes(number, "text", each=EACH, seed=0)
    training = scenes.draw_scenes(number, "training", each=EACH, seed=0)
    known = scenes.draw_scenes(TEST, "training", each=1, seed=1)
    test = scenes.draw_scenes(TEST, "test", each=1, seed=1)
    pictures = (scenes.paint(own, seed) for seed, own in enumerate((training, test, known), start=2))
    training_pictures, test_pictures, known_pictures = pictures
    return Data(text, training, known, test, training_pictures, known_pictures, test_pictures)


class Clock:
    """Prints what was reached after a stage, and the time that it took."""

    def __init__(self) -> None:
        self.wall = time.monotonic()
        self.cpu = time.process_time()

    def say(self, text: str) -> None:
        wall = time.monotonic()
        cpu = time.process_time()
        if dist.get_rank() == 0:
            print(f"{text} ({wall - self.wall:.0f} s, {cpu - self.cpu:.0f} s of CPU)", flush=True)
        self.wall = wall
        self.cpu = cpu


def told(scores: dict[str, float]) -> str:
    kinds = ", ".join(f"{kind} {scores[kind]:.3f}" for kind in scenes.KINDS)
    return f"{scores['all']:.3f} of the answers right ({kinds}), loss {scores['loss']:.3f}"


def make_dense() -> tuple[Config, VisionLanguageModel]:
    device = start_processes()
    config = load_config(None, DENSE)
    torch.manual_seed(config.train.seed)
    return config, VisionLanguageModel(config, make_context(1), Encoder(config)).to(device)


def train_encoder(config: Config, encoder: Encoder, data: Data, steps: int) -> None:
    clock = Clock()
    device = next(encoder.parameters()).device
    names_BC2 = scenes.names_of_cells(data.training)
    train("encoder", encoder, [encoder], config, (data.training_pictures, names_BC2), steps)
    wanted_BC2 = scenes.names_of_cells(data.test)
    with torch.no_grad():
        named = [logits.argmax(dim=2).cpu() for logits in encoder.names(data.test_pictures.to(device))]
    right_BC = (torch.stack(named, dim=2) == wanted_BC2).all(dim=2)
    filled_BC = wanted_BC2[..., 0] > 0
    unseen_BC = never_together()[wanted_BC2[..., 0], wanted_BC2[..., 1]]
    shares = [right_BC[own].float().mean().item() for own in (filled_BC & ~unseen_BC, unseen_BC)]
    clock.say(f"Encoder: names {shares[0]:.3f} of the things of known pairs, {shares[1]:.3f} of unseen pairs")


def train_dense(data: Data, steps: Sequence[int]) -> VisionLanguageModel:
    """The pretrained parts, and stages 1 and 2."""
    config, model = make_dense()
    decayed = load_config(None, [*DENSE, "optimizer.weight_decay=0.3"])  # for pairs that it has not seen
    train_encoder(decayed, model.encoder, data, steps[0])
    clock = Clock()
    descriptions = (None, *conversations(data.text, seed=0, described=True))
    train("language model", model, [model.decoder], config, descriptions, steps[1])
    clock.say("Language model: trained on descriptions")
    examples = (data.training_pictures, *conversations(data.training, seed=0, described=False))
    train("stage 1", model, [model.projector], config, examples, steps[2])
    clock.say(f"Stage 1, the projector: {told(test(model, data.test_pictures, data.test))}")
    train("stage 2", model, [model.projector, model.decoder], config, examples, steps[3])
    clock.say(f"Stage 2, dense: {told(test(model, data.test_pictures, data.test))}")
    clock.say(f"  on new pictures of known pairs: {told(test(model, data.known_pictures, data.known))}")
    return model


def train_sparse(
    router: str, dense: VisionLanguageModel, seed: int, data: Data, steps: int, output: Path | None
) -> dict[str, float]:
    """Stage 3; returns the scores, with the ``flops`` and the ``experts`` per token of the training."""
    clock = Clock()
    parallel = f"parallel.expert={dist.get_world_size()}"
    config = load_config(None, [*DENSE, *SPARSE, *ROUTERS[router], f"train.seed={seed}", parallel])
    model = upcycle(dense, config)
    examples = (data.training_pictures, *conversations(data.training, seed, described=False))
    parts = list(model.decoder.moe_layers)
    flops, experts = train(f"stage 3, {router}", model, parts, config, examples, steps)
    scores = test(model, data.test_pictures, data.test)
    clock.say(f"Stage 3, {router}: {told(scores)}; {experts:.3f} experts per token, {flops / 1e12:.3f} TFLOPs")
    clock.say(f"  on new pictures of known pairs: {told(test(model, data.known_pictures, data.known))}")
    if router == "top-any":
        print_experts(model, data.test_pictures, data.test)
    if output is not None:
        write_page(model, data.test_pictures[:SHOWN], data.test[:SHOWN], steps, output)
    return {**scores, "flops": flops, "experts": experts}


def print_comparison(results: Sequence[dict[str, dict[str, float]]]) -> None:
    """A table of both routers by seed, with differences between runs of the same seed."""
    print("\n| seed | accuracy, top-any | top-2 | difference | loss, top-any | top-2 | difference | FLOPs, ratio |")
    print("|---|---|---|---|---|---|---|---|")
    differences: dict[str, list[float]] = {"all": [], "loss": []}
    for seed, result in enumerate(results):
        own = result["top-any"]
        other = result["top-2"]
        cells = []
        for score in ("all", "loss"):
            differences[score].append(own[score] - other[score])
            cells.append(f"{own[score]:.4f} | {other[score]:.4f} | {own[score] - other[score]:+.4f}")
        print(f"| {seed} | {' | '.join(cells)} | {own['flops'] / other['flops']:.4f} |")
    if len(results) < 2:
        return
    for name, values in (("Accuracy", differences["all"]), ("Loss", differences["loss"])):
        mean = statistics.mean(values)
        deviation = statistics.stdev(values)
        reach = stats.t.ppf(0.975, len(values) - 1) * deviation / len(values) ** 0.5
        print(f"{name}, top-any minus top-2: {mean:+.4f}, 95 % interval [{mean - reach:+.4f}, {mean + reach:+.4f}]")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds of stage 3, from 0")
    parser.add_argument("--compare", action="store_true", help="stage 3 with top-2 too")
    parser.add_argument("--scenes", type=int, default=8000, help="number of training pictures")
    parser.add_argument(
        "--steps", type=int, nargs=5, default=STEPS, metavar=("ENCODER", "LANGUAGE", "ONE", "TWO", "THREE"),
        help="training steps of the encoder, the language model, and stages 1, 2 and 3",
    )  # fmt: skip
    parser.add_argument("--dense", type=Path, help="dense.pt of an earlier call, in place of stages 1 and 2")
    parser.add_argument("--output", type=Path, default=Path("runs/vision_language/tokens.html"), help="the token view")
    given = parser.parse_args()
    start_processes()
    data = draw(given.scenes)
    if given.dense is None:
        dense = train_dense(data, given.steps)
        if dist.get_rank() == 0:
            given.output.parent.mkdir(parents=True, exist_ok=True)
            torch.save(dense.state_dict(), given.output.with_name("dense.pt"))
    else:
        _, dense = make_dense()
        dense.load_state_dict(torch.load(given.dense, map_location="cpu"))
        dense.eval()
    results = []
    for seed in range(given.seeds):
        routers = ROUTERS if given.compare else ["top-any"]
        pages = {"top-any": given.output if seed == 0 else None}
        results.append({
            router: train_sparse(router, dense, seed, data, given.steps[4], pages.get(router)) for router in routers
        })  # fmt: skip
    if dist.get_rank() == 0:
        if given.compare:
            print_comparison(results)
        print(f"Token view: {given.output}")
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    main()
