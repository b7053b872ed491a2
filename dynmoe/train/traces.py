"""Routing traces: experts and gates of every token of a step, as Parquet.

A traced step has a directory ``traces/step_N`` with a file for each rank that holds MoE layers. A row is one token in
one layer:

=========  =============  ====================================================================================
step       int32          optimizer step
layer      int16          index of the decoder layer
sample     int64          number of the training sequence in the data order of the run
position   int32          position of the token in its sequence
token      int32          token id
experts    list<int16>    experts that computed the token, in ascending order
gates      list<float32>  gate of each of these experts
dropped    list<int16>    experts selected by the router and dropped by the capacity or the mean-experts limit
=========  =============  ====================================================================================
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynmoe.data.batches import Batch
from dynmoe.moe.trace import RoutingTrace, TracedPass
from dynmoe.train.checkpoint import step_directories, step_of

Routes = tuple[Tensor, Tensor]


def traces_of(path: Path) -> Path:
    """The directory of the traces of a run; ``path`` is that of the run, or already that of its traces."""
    return path / "traces" if (path / "traces").is_dir() else path


def step_directory(directory: Path, step: int) -> Path:
    """The directory of a step's trace."""
    return directory / f"step_{step:08d}"


def write_trace(
    directory: Path,
    step: int,
    rank: int,
    trace: RoutingTrace,
    samples: Sequence[range],
    batches: Sequence[Batch],
    positions_P: Tensor,
) -> None:
    """Writes this rank's trace of a step atomically.

    Args:
        directory: directory of the run's traces.
        step: number of the optimizer step.
        rank: rank of this process, used in the file name.
        trace: trace of the step.
        samples: numbers of the sequences of each micro-batch.
        batches: the micro-batches.
        positions_P: positions in a sequence that this rank computed, in its order.
    """
    tables = []
    for own in trace.passes():
        own_samples = samples[own.micro_batch]
        tokens_BP = batches[own.micro_batch].tokens_BS[:, positions_P]
        sample_T = torch.arange(own_samples.start, own_samples.stop).repeat_interleave(len(positions_P))
        position_T = positions_P.repeat(len(tokens_BP))
        tables.append(trace_table(step, own.layer, sample_T, position_T, tokens_BP.flatten(), *_routes(own)))
    if tables:  # none on a pipeline stage of dense layers
        write_tables(step_directory(directory, step), rank, tables)


def _routes(traced: TracedPass) -> tuple[Routes, Tensor, Routes]:
    route_N, gates_N = traced.sorted_routes()
    num_experts = traced.num_experts
    dropped_M = traced.dropped_M
    return (route_N // num_experts, route_N % num_experts), gates_N, (dropped_M // num_experts, dropped_M % num_experts)


def write_tables(folder: Path, rank: int, tables: Sequence[Any]) -> None:
    """Writes tables of :func:`trace_table` as the file of a rank, atomically."""
    import pyarrow as pa  # imported here, as only traces need it
    from pyarrow import parquet

    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f".rank_{rank:05d}.tmp"
    parquet.write_table(pa.concat_tables(tables), unfinished, compression="zstd")
    unfinished.rename(folder / f"rank_{rank:05d}.parquet")


def trace_table(
    step: int, layer: int, sample_T: Tensor, position_T: Tensor, token_T: Tensor, routes: Routes, gates_N: Tensor,
    dropped: Routes,
) -> Any:  # fmt: skip
    """The rows of one layer.

    Args:
        step: number of the optimizer step.
        layer: index of the layer.
        sample_T, position_T, token_T: columns of these names.
        routes: row and expert of each computed route, by row and expert.
        gates_N: gates of these routes.
        dropped: row and expert of each dropped route, in the same order.
    """
    import pyarrow as pa

    size = len(token_T)
    token_N, expert_N = routes
    token_M, expert_M = dropped
    return pa.table({
        "step": pa.array(torch.full((size,), step).numpy(), pa.int32()),
        "layer": pa.array(torch.full((size,), layer).numpy(), pa.int16()),
        "sample": pa.array(sample_T.numpy(), pa.int64()),
        "position": pa.array(position_T.numpy(), pa.int32()),
        "token": pa.array(token_T.numpy(), pa.int32()),
        "experts": token_lists(token_N, expert_N, size, pa.int16()),
        "gates": token_lists(token_N, gates_N, size, pa.float32()),
        "dropped": token_lists(token_M, expert_M, size, pa.int16()),
    })  # fmt: skip


def token_lists(token_N: Tensor, values_N: Tensor, num_tokens: int, kind: Any) -> Any:
    """An Arrow array with the list of values of each token; ``token_N`` is sorted."""
    import pyarrow as pa

    ends_T = token_N.bincount(minlength=num_tokens).cumsum(0)
    offsets = torch.cat([ends_T.new_zeros(1), ends_T]).int()
    return pa.ListArray.from_arrays(pa.array(offsets.numpy()), pa.array(values_N.numpy(), kind))


def cut_traces(directory: Path, step: int) -> None:
    """Removes the traces of steps after ``step``, which a resumed run writes again."""
    for folder in step_directories(directory):
        if step_of(folder) > step:
            shutil.rmtree(folder)
