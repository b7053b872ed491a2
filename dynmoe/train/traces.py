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
    import pyarrow as pa  # imported here, as only traces need it
    from pyarrow import parquet

    tables = [
        pa.table(_columns(own, step, samples[own.micro_batch], batches[own.micro_batch], positions_P))
        for own in trace.passes()
    ]
    if not tables:  # a pipeline stage of dense layers
        return
    folder = step_directory(directory, step)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f".rank_{rank:05d}.tmp"
    parquet.write_table(pa.concat_tables(tables), unfinished, compression="zstd")
    unfinished.rename(folder / f"rank_{rank:05d}.parquet")


def _columns(traced: TracedPass, step: int, samples: range, batch: Batch, positions_P: Tensor) -> dict[str, Any]:
    import pyarrow as pa

    tokens_BP = batch.tokens_BS[:, positions_P]
    num_rows = tokens_BP.numel()
    position_T = positions_P.repeat(len(tokens_BP))
    sample_T = torch.arange(samples.start, samples.stop).repeat_interleave(len(positions_P))
    route_N, gates_N = traced.sorted_routes()
    token_N = route_N // traced.num_experts
    expert_N = route_N % traced.num_experts
    dropped_M = traced.dropped_M
    return {
        "step": pa.array([step] * num_rows, pa.int32()),
        "layer": pa.array([traced.layer] * num_rows, pa.int16()),
        "sample": pa.array(sample_T.numpy(), pa.int64()),
        "position": pa.array(position_T.numpy(), pa.int32()),
        "token": pa.array(tokens_BP.flatten().numpy(), pa.int32()),
        "experts": token_lists(token_N, expert_N, num_rows, pa.int16()),
        "gates": token_lists(token_N, gates_N, num_rows, pa.float32()),
        "dropped": token_lists(dropped_M // traced.num_experts, dropped_M % traced.num_experts, num_rows, pa.int16()),
    }


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
