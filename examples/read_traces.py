"""Loads a run's routing traces into pandas: python examples/read_traces.py runs/NAME

A trace has a row for each token in each layer of each traced step (train.py --trace; docs/statistics.md describes the
columns). Prints experts per token by step and layer, experts that work together, and tokens with the most experts.
"""

from __future__ import annotations

import sys
from itertools import combinations
from pathlib import Path

import pandas as pd

from dynmoe.data.tokenizer import Tokenizer
from dynmoe.data.tokenizer_files import open_tokenizer


def load(run: Path) -> pd.DataFrame:
    """Loads every row of every traced step, with ``k``, the token's number of experts."""
    routes = pd.read_parquet(run / "traces")
    return routes.assign(k=routes["experts"].str.len()).sort_values(["step", "layer", "sample", "position"])


def pairs(routes: pd.DataFrame) -> pd.Series:
    """Counts how often two experts of a layer compute the same token, by layer and pair."""
    together = routes.assign(pair=[list(combinations(experts, 2)) for experts in routes["experts"]])
    return together.explode("pair").dropna(subset="pair").groupby(["layer", "pair"]).size().sort_values(ascending=False)


def by_token(routes: pd.DataFrame, tokenizer: Tokenizer, at_least: int = 3) -> pd.DataFrame:
    """Mean experts and count of each piece of text that occurs ``at_least`` times, in decreasing order."""
    table = routes.groupby("token")["k"].agg(["mean", "size"])
    table.index = [tokenizer.piece(token) for token in table.index]
    return table[table["size"] >= at_least * routes["layer"].nunique()].sort_values("mean", ascending=False)


def main() -> None:
    run = Path(sys.argv[1])
    routes = load(run)
    print("experts per token:", routes.pivot_table(index="step", columns="layer", values="k").round(2), sep="\n")
    print("experts that work together most (layer, pair):", pairs(routes).head(10), sep="\n")
    print("tokens with the most experts:", by_token(routes, open_tokenizer(run)).head(10).round(2), sep="\n")


if __name__ == "__main__":
    main()
