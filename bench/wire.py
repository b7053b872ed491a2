"""Benchmark 7: bytes between the ranks of one layer, forward and backward, for 1, 2 and 4 expert-parallel ranks.

There are two minima: one row for each routed row that leaves its rank, and one row for each token and other rank that
has an expert of it. Both count four times: tokens, outputs and their gradients. Processes on this machine, over gloo.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from bench.cases import DTYPES, FixedRouter, model_config
from bench.report import verdict
from dynmoe.moe import MoEContext, MoEGroups, MoELayer
from harness.plans import Shape, spread_plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, default=1024, help="tokens per rank")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--mean-k", type=float, nargs="+", default=[1.5, 2.0, 4.0, 6.0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--dtypes", nargs="+", default=["bf16"], choices=sorted(DTYPES))


def run(given: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for ranks in given.ranks:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(_serve, (ranks, folder, given), nprocs=ranks)
            seen = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(ranks)]
        for place, case in enumerate(seen[0]):
            sent, routed, tokens = (sum(own[place][name] for own in seen) for name in ("sent", "routed", "tokens"))
            rows.append({
                "dtype": case["dtype"], "ranks": ranks, "mean_k": case["mean_k"], "sent_bytes": sent,
                "over_routed_rows": sent / routed if routed else 0.0, "over_tokens": sent / tokens if tokens else 0.0,
            })  # fmt: skip
    return rows


def _serve(rank: int, ranks: int, folder: str, given: argparse.Namespace) -> None:
    """Runs on each rank: all cases; writes its counts to ``folder``."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    cases = [_measure(rank, ranks, dtype, mean_k, given) for dtype in given.dtypes for mean_k in given.mean_k]
    torch.save(cases, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def _measure(rank: int, ranks: int, dtype: str, mean_k: float, given: argparse.Namespace) -> dict[str, Any]:
    shape = Shape(given.tokens, given.hidden, 64, given.experts)
    plan = spread_plan(shape, mean_k, imbalance=1.5, seed=rank, device=torch.device("cpu"))
    context = MoEContext(MoEGroups(expert=dist.group.WORLD if ranks > 1 else None))
    layer = MoELayer(model_config(shape), 0, 0, context).to(DTYPES[dtype])
    layer.router = FixedRouter(plan)  # type: ignore[assignment]
    x_TD = torch.randn(shape.tokens, shape.hidden, dtype=DTYPES[dtype], requires_grad=True)
    layer(x_TD).sum().backward()
    away_TRL = plan.routing_map_TE.view(shape.tokens, ranks, -1).clone()
    away_TRL[:, rank] = False
    row = 4 * shape.hidden * x_TD.element_size()
    return {
        "dtype": dtype, "mean_k": mean_k, "sent": layer.drain().sent_bytes, "routed": int(away_TRL.sum()) * row,
        "tokens": int(away_TRL.any(dim=2).sum()) * row,
    }  # fmt: skip


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    spread = [row for row in rows if row["ranks"] > 1]
    if not spread:
        return []
    return [
        verdict("bytes over those of rows as routed, the worst", max(row["over_routed_rows"] for row in spread), 1.02),
        verdict(
            "bytes over those of one row per token and rank, the worst", max(row["over_tokens"] for row in spread), 1.05
        ),
    ]
