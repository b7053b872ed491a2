"""DynMoE's vision-language case at small scale: WIP"""

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
import random
import resource

import deepspeed
import torch
import torch.nn.functional as F
import torch.distributed as dist
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from torch import Tensor, nn

import scenes
from dynmoe.config import Config, load_config
from dynmoe.engines.deepspeed import DeepSpeedMoELayer, make_context, start_processes
from dynmoe.engines.deepspeed_state import OptimizerState
from dynmoe.engines.runtime import MoERuntime
from dynmoe.model import Decoder, ModelSize
from dynmoe.moe.experts import SwiGLU
from dynmoe.moe.upcycling import copy_experts
from dynmoe.train.optimizer import parameter_groups

PATCH = 4
SIDE = scenes.GRID * scenes.CELL // PATCH
PATCHES = SIDE**2
WORDS = ["<pad>", *scenes.words()]
ID = {word: number for number, word in enumerate(WORDS)}


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        model = config.model
        self.attention_norm = nn.LayerNorm(model.hidden)
        self.ffn_norm = nn.LayerNorm(model.hidden)
        self.attention = nn.MultiheadAttention(model.hidden, model.heads, batch_first=True)
        self.ffn = SwiGLU(model, model.ffn_hidden, config.train.seed, f"encoder.{layer}")

    def forward(self, x_BPD):
        n = self.attention_norm(x_BPD)
        x_BPD = x_BPD + self.attention(n, n, n, need_weights=False)[0]
        return x_BPD + self.ffn(self.ffn_norm(x_BPD))


class Encoder(nn.Module):
    def __init__(self, config, layers=2):
        super().__init__()
        hidden = config.model.hidden
        self.embed = nn.Linear(3 * PATCH**2, hidden)
        self.positions = nn.Parameter(torch.randn(PATCHES, hidden) * 0.02)
        self.blocks = nn.Sequential(*(Block(config, layer) for layer in range(layers)))
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, len(scenes.COLOURS) + len(scenes.SHAPES) + 2)

    def features(self, pictures):
        p = F.unfold(pictures, PATCH, stride=PATCH).transpose(1, 2)
        return self.norm(self.blocks(self.embed(p) + self.positions))

    def forward(self, pictures, names_BC2):
        x = self.features(pictures).transpose(1, 2).unflatten(2, (SIDE, SIDE))
        cells = F.avg_pool2d(x, SIDE // scenes.GRID).flatten(2).transpose(1, 2)
        colour, shape = self.head(cells).split([len(scenes.COLOURS) + 1, len(scenes.SHAPES) + 1], dim=2)
        if not self.training:
            return torch.stack([colour.argmax(2), shape.argmax(2)], 2) == names_BC2
        return F.cross_entropy(colour.flatten(0, 1), names_BC2[..., 0].flatten()) + F.cross_entropy(
            shape.flatten(0, 1), names_BC2[..., 1].flatten()
        )


class VisionLanguageModel(nn.Module):
    def __init__(self, config, context, encoder):
        super().__init__()
        hidden = config.model.hidden
        self.encoder = encoder
        self.projector = nn.Sequential(nn.Linear(hidden, 2 * hidden), nn.GELU(), nn.Linear(2 * hidden, hidden))
        self.decoder = Decoder(config.model, len(WORDS), config.train.seed, context, make_moe=DeepSpeedMoELayer)

    def logits(self, pictures, tokens_BS, wanted):
        prefix = None
        if pictures is not None:
            with torch.no_grad():
                f = self.encoder.features(pictures)
            prefix = self.projector(f)
        h = self.decoder.hidden(tokens_BS, prefix_BPD=prefix)
        if prefix is not None:
            h = h[:, PATCHES:]
        return F.linear(h[wanted], self.decoder.output_weight_VD)

    def forward(self, pictures, tokens_BS, labels_BS):
        wanted = labels_BS >= 0
        return F.cross_entropy(self.logits(pictures, tokens_BS, wanted), labels_BS[wanted])


def encode(text):
    return [ID[w] for w in text.split()]


def conversation(scene, drawn, described):
    """tokens, labels"""
    toks, labs = [], []
    if described:
        things = list(scene.things)
        drawn.shuffle(things)
        for t in things:
            e = encode(str(t))
            toks += e
            labs += e
    qs = list(scene.questions.values())
    drawn.shuffle(qs)
    for q in qs:
        e = encode(q.text)
        toks += e + [ID[q.answer]]
        labs += (e if described else [-1] * len(e)) + [ID[q.answer]]
    return toks, labs


def pad(rows, value):
    n = max(map(len, rows))
    return torch.tensor([r + [value] * (n - len(r)) for r in rows])


def texts(scs, seed, described):
    drawn = random.Random(seed)
    rows = [conversation(s, drawn, described) for s in scs]
    toks = pad([r[0] for r in rows], 0)
    labs = pad([r[1] for r in rows], -1)
    return toks[:, :-1], labs[:, 1:]


def train(name, model, parts, config, inputs, batch, lr, steps=None, flops=None, size=None):
    model.requires_grad_(False)
    for p in parts:
        p.requires_grad_(True)
    layers = [m for m in model.modules() if isinstance(m, DeepSpeedMoELayer)]
    groups = split_params_into_different_moe_groups_for_optimizer(parameter_groups(nn.ModuleList(parts), config))
    adam = torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=(0.9, 0.98))
    engine, optimizer, *_ = deepspeed.initialize(
        model=model, optimizer=adam,
        config={"train_micro_batch_size_per_gpu": batch, "zero_optimization": {"stage": 0}, "gradient_clipping": 1.0, "steps_per_print": 10**9},
    )
    context = layers[0].context if layers else make_context(1)
    runtime = MoERuntime(config, layers, context, OptimizerState(optimizer, adam), [(n, p) for n, p in model.named_parameters()], torch.device("cpu"))
    gen = torch.Generator().manual_seed(config.train.seed)
    n = len(inputs[-1])
    step = 0
    spent = 0
    order = None
    started = time.time()
    total = flops or steps
    engine.train()
    while spent < total:
        step += 1
        if order is None or len(order) < batch:
            order = torch.randperm(n, generator=gen)
        chosen, order = order[:batch], order[batch:]
        args = [None if x is None else x[chosen] for x in inputs]
        for g in adam.param_groups:
            g["lr"] = lr * min(1, step / 50, 1.02 - spent / total) * g["lr_factor"]
        if layers:
            runtime.calibrate(lambda: model(*args))
        with runtime.step(step, loss_scale=1.0):
            loss = engine(*args)
            engine.backward(loss)
        engine.step()
        events = runtime.apply_step(step)
        rows = runtime.report().routed_rows if layers else {}
        if flops:
            tokens = batch * (PATCHES + args[1].shape[1])
            spent += size.flops(tokens, sum(rows.values()))
        else:
            spent += 1
        for e in events:
            print("   ", e)
        if step % 50 == 0:
            k = [f"{r / (batch * (PATCHES + args[1].shape[1])):.2f}" for r in rows.values()]
            print(f"{name} step {step}: loss {loss.item():.4f} {k} {time.time() - started:.0f} s", flush=True)
    model.eval()
    return step


@torch.no_grad()
def test(model, pictures, scs):
    right, loss = {}, 0
    for kind in scenes.KINDS:
        qs = [s.questions[kind] for s in scs]
        toks = torch.tensor([encode(q.text) for q in qs])
        ans = torch.tensor([ID[q.answer] for q in qs])
        wanted = torch.zeros_like(toks, dtype=torch.bool)
        wanted[:, -1] = True
        out = torch.cat([model.logits(p, t, w) for p, t, w in zip(pictures.split(250), toks.split(250), wanted.split(250))])
        right[kind] = (out.argmax(1) == ans).float().mean().item()
        loss += F.cross_entropy(out, ans).item() / len(scenes.KINDS)
    right["all"] = sum(right.values()) / len(right)
    return {k: round(v, 4) for k, v in right.items()}, round(loss, 4)


def cpu():
    u = resource.getrusage(resource.RUSAGE_SELF)
    return f"{u.ru_utime:.0f}"
