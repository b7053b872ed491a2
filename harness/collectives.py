"""Counts of collectives and host reads in a training step; see the definitions in bench/collectives.py."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dynmoe.config import Config, load_config
from dynmoe.data.batches import Batch
from harness.processes import ROOT

LAYOUTS = {
    "deepspeed, data": [],
    "megatron, data": ["engine=megatron"],
    "megatron, pipeline": ["engine=megatron", "parallel.pipeline=2"],
}
_VOCAB, _LENGTH, _MICRO_BATCHES = 64, 16, 2
_MOVES = ("send", "recv_", "alltoall_", "alltoall_base_")
_READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")
_ON_A_CPU_ONLY = ("ops/backends.py", "ops/permute.py", "routing/selection.py")
_ENGINES = ("/deepspeed/", "/megatron/core/")


def _caller() -> tuple[str, str]:
    """Whose code is being run ("ours" or "engine"), and where in it: file and function."""
    frame = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        if any(part in path for part in _ENGINES) and "site-packages" in path:
            return "engine", f"{Path(path).name}:{frame.f_code.co_name}"
        if path.startswith(f"{ROOT}/") and path != __file__ and "site-packages" not in path:
            return "ours", f"{Path(path).relative_to(ROOT)}:{frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "ours", "nowhere"


class _Collectives(TorchDispatchMode):
    def __init__(self, seen: Counter[tuple[str, str, str]]) -> None:
        super().__init__()
        self._seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and func.overloadpacket.__name__ not in _MOVES:
            self._seen["collectives", *_caller()] += 1
        return func(*args, **(kwargs or {}))


class _Reads(TorchFunctionMode):
    def __init__(self, seen: Counter[tuple[str, str, str]]) -> None:
        super().__init__()
        self._seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _READS and getattr(torch.Tensor, name) is func:
            whose, where = _caller()
            if not any(part in where for part in _ON_A_CPU_ONLY):
                self._seen["host_reads", whose, where] += 1
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def counting() -> Iterator[Counter[tuple[str, str, str]]]:
    """Counts of this process while it goes on, by kind ("collectives", "host_reads") and what :func:`_caller` says."""
    seen = Counter[tuple[str, str, str]]()
    with _Collectives(seen), _Reads(seen):
        yield seen


def config_of(layout: str, layers: int) -> Config:
    """A small model of so many layers on two ranks."""
    own = LAYOUTS[layout]
    data_ranks = 1 if "parallel.pipeline=2" in own else 2
    return load_config(None, [
        "model.hidden=32", "model.heads=2", "model.kv_heads=2", "model.moe.experts=4", "model.moe.expert_hidden=32",
        f"model.layers={layers}", f"data.sequence_length={_LENGTH}", "train.micro_batch=1",
        f"train.global_batch={_MICRO_BATCHES * data_ranks}", "model.router.kind=top_p", "budget.method=pi",
        "budget.experts_per_token=2", "budget.scope=global", "model.router.balance_scope=global_batch", *own,
    ])  # fmt: skip


def count_steps(layout: str, layers: int) -> dict[str, Counter[tuple[str, str, str]]]:
    """What this rank counts in the third step ("plain") and in the fourth ("logged")."""
    from dynmoe.engines import make_engine

    engine = make_engine(config_of(layout, layers), _VOCAB)
    generator = torch.Generator().manual_seed(engine.data_rank)
    tokens = torch.randint(_VOCAB, (_MICRO_BATCHES, 1, _LENGTH + 1), generator=generator)
    batches = [Batch(part[:, :-1], part[:, 1:]) for part in tokens]
    counts = {}
    for kind in ("first", "second", "plain", "logged"):
        with counting() as counts[kind]:
            engine.compute_gradients(batches, record=kind == "logged")
            engine.update(1e-3)
            if kind == "logged":
                engine.report()
    return {kind: counts[kind] for kind in ("plain", "logged")}
