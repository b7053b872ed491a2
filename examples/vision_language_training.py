"""Conversations about pictures, training of parts of a model under DeepSpeed, and the test, for vision_language.py."""

import random
from collections.abc import Sequence

import deepspeed
import scenes
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from scenes import Scene
from torch import Tensor, nn
from vision_language_model import IDS, IGNORED, TOKENS, WORDS, VisionLanguageModel, encode, pad

from dynmoe.config import Config
from dynmoe.engines.deepspeed import DeepSpeedMoELayer, make_context
from dynmoe.engines.deepspeed_state import OptimizerState
from dynmoe.engines.runtime import MoERuntime
from dynmoe.model import ModelSize
from dynmoe.moe.upcycling import copy_experts
from dynmoe.train.optimizer import parameter_groups

BATCH = 32
EXPERTS = 2.0  # per token, in the FLOPs of a step


def conversations(drawn_scenes: Sequence[Scene], seed: int, described: bool) -> tuple[Tensor, Tensor]:
    """Tokens and labels [B, S]: questions and answers in random order; labels are the answers.

    With ``described``, for a model without pictures, the things come first, in words, and every word is a label.
    """
    drawn = random.Random(seed)
    tokens = []
    labels = []
    for scene in drawn_scenes:
        told = [f"{thing.colour} {thing.shape} {thing.place}" for thing in scene.things] if described else []
        drawn.shuffle(told)
        ids = encode(" ".join(told))
        wanted = list(ids)
        for question in drawn.sample(scene.questions, len(scene.questions)):
            asked = encode(question.text)
            ids += [*asked, IDS[question.answer]]
            wanted += [*(asked if described else [IGNORED] * len(asked)), IDS[question.answer]]
        tokens.append(ids)
        labels.append(wanted)
    return pad(tokens, IDS["<pad>"])[:, :-1], pad(labels, IGNORED)[:, 1:]


def train(
    name: str, model: nn.Module, parts: Sequence[nn.Module], config: Config, examples: Sequence[Tensor | None],
    steps: int,
) -> tuple[int, float]:  # fmt: skip
    """Trains ``parts`` of a model until the FLOPs of ``steps`` steps, with ``EXPERTS`` experts per token, are spent.

    FLOPs are those of the decoder, with the routed rows that were counted.

    Returns:
        FLOPs, and experts per token over all steps and layers.
    """
    model.requires_grad_(False).train()
    trained = nn.ModuleList(parts).requires_grad_(True)
    ranks = dist.get_world_size()
    layers = [module for module in model.modules() if isinstance(module, DeepSpeedMoELayer)]
    context = layers[0].context if layers else make_context(ranks)
    groups = split_params_into_different_moe_groups_for_optimizer(parameter_groups(trained, config))
    adam = torch.optim.AdamW([group for group in groups if group["params"]], betas=(0.9, 0.95), fused=True)
    engine, optimizer, *_ = deepspeed.initialize(
        model=model, optimizer=adam,
        config={"train_micro_batch_size_per_gpu": BATCH // ranks, "gradient_clipping": 1.0},
    )  # fmt: skip
    device = next(model.parameters()).device
    runtime = MoERuntime(config, layers, context, OptimizerState(optimizer, adam), model.named_parameters(), device)
    length = examples[-1].shape[1] + (0 if examples[0] is None else TOKENS)
    size = ModelSize(config.model, len(WORDS), length)
    total = steps * size.static_flops(BATCH * length, EXPERTS)
    generator = torch.Generator().manual_seed(config.train.seed)  # the same on every rank
    spent = step = rows = 0
    while total - spent > total / steps / 2:  # to the nearest step
        step += 1
        chosen = torch.randint(len(examples[-1]), (BATCH,), generator=generator)[dist.get_rank() :: ranks]
        batch = [None if own is None else own[chosen].to(device) for own in examples]
        for group in adam.param_groups:
            left = 1 - spent / total
            group["lr"] = config.optimizer.lr * min(1.0, step / 50, left + 1 / steps) * group["lr_factor"]
        runtime.calibrate(lambda batch=batch: model(*batch))
        with runtime.step(step, loss_scale=1.0):
            loss = engine(*batch)
            engine.backward(loss)
        engine.step()
        events = runtime.apply_step(step)
        routed = sum(runtime.report().routed_rows.values())
        rows += routed
        spent += size.flops(BATCH * length, routed)
        if dist.get_rank() == 0:
            for event in events:
                print(f"  step {step}, layer {event.layer}: expert {event.expert} {event.change}, {event.reason}")
            if step % 100 == 0:
                print(f"  {name}, step {step}: loss {loss.item():.3f}", flush=True)
    model.eval()
    return spent, rows / (step * BATCH * length * max(1, len(layers)))


@torch.no_grad()
def test(model: VisionLanguageModel, pictures: Tensor, drawn: Sequence[Scene]) -> dict[str, float]:
    """Share of right answers by kind and of all, and the loss; each question is asked alone."""
    device = next(model.parameters()).device
    scores = {}
    loss = 0.0
    for kind in scenes.KINDS:
        asked = [(n, own) for n, scene in enumerate(drawn) for own in scene.questions if own.kind == kind]
        tokens_BS = torch.tensor([encode(question.text) for _, question in asked])
        answers_B = torch.tensor([IDS[question.answer] for _, question in asked])
        own = pictures[[number for number, _ in asked]]
        last_BS = torch.zeros_like(tokens_BS, dtype=torch.bool)
        last_BS[:, -1] = True
        parts = zip(*(tensor.to(device).split(256) for tensor in (own, tokens_BS, last_BS)), strict=True)
        logits_BV = torch.cat([model.logits(*part) for part in parts]).cpu()
        scores[kind] = (logits_BV.argmax(dim=1) == answers_B).float().mean().item()
        loss += F.cross_entropy(logits_BV, answers_B).item() / len(scenes.KINDS)
    return {**scores, "all": sum(scores.values()) / len(scores), "loss": loss}


def upcycle(dense: VisionLanguageModel, config: Config) -> VisionLanguageModel:
    """The dense model with experts in place of its feed-forward layers: copies that compute the same."""
    device = next(dense.parameters()).device
    model = VisionLanguageModel(config, make_context(config.parallel.expert), dense.encoder).to(device)
    missing, _ = model.load_state_dict(dense.state_dict(), strict=False)
    assert all(".moe." in name for name in missing), missing
    for layer in model.decoder.moe_layers:
        seed = config.train.seed + 100 * layer.layer + dist.get_rank()
        copy_experts(dense.decoder.layers[layer.layer].ffn, layer.experts, 1, seed, symmetry_break=0.1)
    return model
