"""Combines and compares the results of several ranks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.engines.cases import LENGTH


def maps_of_all_ranks(results: list[dict[str, Any]]) -> dict[int, list[torch.Tensor]]:
    """Routing maps in the token order of one process, by layer and forward pass."""
    whole: dict[int, list[torch.Tensor]] = {}
    for layer in sorted({layer for result in results for layer in result["maps"]}):
        held = [result for result in results if layer in result["maps"]]
        parts = len({result["place"][1] for result in held})
        data_ranks = sorted({result["place"][0] for result in held})
        whole[layer] = [
            torch.cat([_joined(held, layer, number, data_rank, parts) for data_rank in data_ranks]).flatten(0, 1)
            for number in range(len(held[0]["maps"][layer]))
        ]
    return whole


def _joined(held: list[dict[str, Any]], layer: int, number: int, data_rank: int, parts: int) -> torch.Tensor:
    """Routing map [B, S, E] of a data-parallel rank, joined over the ranks that share its sequences."""
    by_part = {result["place"][1]: result["maps"][layer][number] for result in held if result["place"][0] == data_rank}
    return torch.cat([by_part[part].unflatten(0, (-1, LENGTH // parts)) for part in range(parts)], dim=1)


def read_canonical(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a canonical checkpoint, except random states."""
    files = [path for path in directory.glob("*.safetensors") if not path.name.startswith("random")]
    return {name: value for path in files for name, value in load_file(path).items()}


def largest_difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Largest relative norm of the difference, over tensors of the same name."""
    assert ours.keys() == theirs.keys()
    return max(((ours[n] - theirs[n]).norm() / theirs[n].norm().clamp(min=1e-12)).item() for n in theirs)


def check_that_it_continued(
    straight: list[dict[str, Any]], resumed: list[dict[str, Any]], done: int, figures: Sequence[str]
) -> None:
    """Whether a run that resumed after ``done`` steps is bitwise the uninterrupted one, on every rank."""
    for whole, rest in zip(straight, resumed, strict=True):
        for figure in figures:
            assert rest[figure] == whole[figure][done:], figure
        assert rest["state"].keys() == whole["state"].keys()
        assert all(torch.equal(value, rest["state"][name]) for name, value in whole["state"].items())
