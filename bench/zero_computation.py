"""Benchmark 16: identity experts compared with plain top-k, time of a layer and bytes between eight ranks.

Both select k experts per token. Of those that identity experts select, some return the token on its own rank: the
biases of the others are moved until K̄ experts per token remain that must be sent and computed. Times are in the same
turn; bytes are those of tokens and outputs and of their gradients, over gloo. In each case the router is our own, with
its auxiliary loss.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from bench.cases import DTYPES, Method, model_config, routing_facts, tokens_of
from bench.report import verdict
from bench.timing import DIRECTIONS, interleave, median_ratio
from dynmoe.moe import MoEContext, MoEGroups, MoELayer
from dynmoe.ops.host_memory import keep_freed_memory
from dynmoe.routing.identity_experts import ffn_bias_change
from harness.plans import Shape

_MOVES = 400


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of the timed layer, and of all ranks")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--width", type=int, default=1024, help="width of an expert")
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--k", type=int, default=3)
    parser.add_argument("--identity", type=int, default=8, help="number of identity experts")
    parser.add_argument("--mean-k", type=float, default=2.0, help="experts per token that are not identity experts")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--dtypes", nargs="+", default=["fp32"], choices=sorted(DTYPES))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")


def run(given: argparse.Namespace) -> list[dict[str, Any]]:
    torch.set_num_threads(given.threads)
    keep_freed_memory()
    return [_measure(given, dtype) for dtype in given.dtypes]


def _measure(given: argparse.Namespace, dtype: str) -> dict[str, Any]:
    shape = Shape(given.tokens, given.hidden, given.width, given.experts)
    x_TD, upstream_TD = tokens_of(shape, dtype)
    layers = {name: _layer(given, name, dtype, MoEContext()) for name in ("top_k", "identity_experts")}
    bias_X = _hold(layers["identity_experts"], x_TD, given.k, given.mean_k)
    with torch.no_grad():
        facts = {name: routing_facts(layer.router(x_TD)) for name, layer in layers.items()}
    methods = [Method(name, layer, layer) for name, layer in layers.items()]
    times = interleave({method.name: method.timed(x_TD, upstream_TD) for method in methods}, given.repeats)
    ratios = {d: median_ratio(times["identity_experts"], times["top_k"], d) for d in DIRECTIONS}
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_send, (folder, given, dtype, bias_X), nprocs=given.ranks)
        sent = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(given.ranks)]
    top_k, identity = (sum(own[name] for own in sent) for name in layers)
    return {
        "dtype": dtype, "k": given.k, "ranks": given.ranks, **facts["identity_experts"],
        "padding_top_k": facts["top_k"]["padding"], **ratios, "sent": identity / top_k,
    }  # fmt: skip


def _layer(given: argparse.Namespace, kind: str, dtype: str, context: MoEContext) -> MoELayer:
    """A layer whose router tells random tokens apart."""
    shape = Shape(given.tokens, given.hidden, given.width, given.experts)
    extra = [f"model.router.num_identity={given.identity}"] if kind == "identity_experts" else []
    config = model_config(shape, f"model.router.kind={kind}", f"model.router.k={given.k}", *extra)
    layer = MoELayer(config, 0, 0, context).to(DTYPES[dtype])
    with torch.no_grad():
        layer.router.get_parameter("weight_ED").mul_(1.0 / config.init_std / given.hidden**0.5)
    return layer


@torch.no_grad()
def _hold(layer: MoELayer, x_TD: Tensor, k: int, mean_k: float) -> Tensor:
    """Moves the biases by the rule of training until ``mean_k`` of the ``k`` experts of a token are FFN experts."""
    bias_X = layer.router.get_buffer("bias_X")
    tokens = torch.tensor(float(len(x_TD)))
    for move in range(_MOVES):
        selected_E = layer.router(x_TD).selected_map_TE.sum(dim=0)
        bias_X[: len(selected_E)] += ffn_bias_change(selected_E, tokens, k, mean_k, rate=3.0 / (1 + move / 40))
    return bias_X


def _send(rank: int, folder: str, given: argparse.Namespace, dtype: str, bias_X: Tensor) -> None:
    """Runs on each rank: one pass of both layers over its part of the tokens; writes the bytes that it sent."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", given.ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=given.ranks)
    shape = Shape(given.tokens, given.hidden, given.width, given.experts)
    x_TD = tokens_of(shape, dtype)[0].chunk(given.ranks)[rank]
    sent = {}
    for name in ("top_k", "identity_experts"):
        layer = _layer(given, name, dtype, MoEContext(MoEGroups(expert=dist.group.WORLD)))
        if name == "identity_experts":
            layer.router.get_buffer("bias_X").copy_(bias_X)
        layer(x_TD.detach().requires_grad_()).sum().backward()
        sent[name] = layer.drain().sent_bytes
    torch.save(sent, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    said = []
    for row in rows:
        where = f"{row['dtype']}, K̄ {row['mean_k']:g} of k {row['k']}, over plain top-{row['k']}"
        said.append(verdict(f"{where}: time of a layer", row["both"], 0.75))
        said.append(verdict(f"{where}: bytes between {row['ranks']} ranks", row["sent"], 0.70))
    return said
