"""Converts routing traces to the layout of the FLAME-MoE traces and back: python -m dynmoe.traces RUN OUT --to flame

FLAME-MoE (arXiv 2505.20225) publishes the routing of its models as the dataset CMU-FLAME/FLAME-MoE-Traces. Sources:

- The dataset's card defines the files. ``samples/NNN.parquet`` has ``token_id`` (int32).
  ``actives/iter_NNNN/layer_NN.parquet`` has ``scores`` (list<float16>[k], descending) and ``indices`` (list<int16>[k]).
  Row i of each is the same token; all iterations share the samples.
- ``megatron/core/transformer/moe/moe_layer.py`` at commit cbaf684c of github.com/yuzc19/Megatron-LM, the submodule of
  github.com/cmu-flame/FLAME-MoE, captures them: ``torch.topk`` of the router's probabilities, in a folder named by
  Megatron's layer number, which counts from 1. The probabilities are a softmax over all experts, not renormalized.

Choices of ours: if tokens differ in their number of experts, rows are lists of different lengths. An index of -1 as
padding would count as the last expert in FLAME-MoE's co-activation analysis, which indexes a Python list with it.
Scores are the gates of our trace. Dropped routes have no place and are left out.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynmoe.cli import run_tool
from dynmoe.errors import UserError, first_line

if TYPE_CHECKING:
    from torch import Tensor

_ROWS = 2**20  # of a batch that is converted at once


def to_flame(traces: Path, output: Path, step: int | None = None) -> list[int]:
    """Writes traced steps in the layout of FLAME-MoE.

    Args:
        traces: directory of traces.
        output: directory to create.
        step: the step to convert; default: all steps.

    Returns:
        The converted steps.

    Raises:
        UserError: there is no such step, or the steps have different tokens, which this layout cannot express.
    """
    from dynmoe.train.checkpoint import step_directories, step_of

    folders = [own for own in reversed(step_directories(traces)) if step in (None, step_of(own))]
    if not folders:
        of_step = "" if step is None else f" of step {step}"
        raise UserError(f"{traces}: has no trace{of_step}; name a run or step that was traced")
    tokens = None
    for folder in folders:
        iteration = output / "actives" / f"iter_{step_of(folder):04d}"
        for layer in _layers(folder):
            rows = _layer_rows(folder, layer)
            own = rows["token"].combine_chunks()
            if tokens is None:
                tokens = own
                _write({"token_id": tokens}, output / "samples" / "000.parquet")
            elif not tokens.equals(own):
                problem = f"layer {layer} has other tokens than before, but the layout has one set of tokens for all"
                raise UserError(f"{folder}: {problem}; convert one step with --step")
            _write(_actives(rows), iteration / f"layer_{layer + 1:02d}.parquet")
    return [step_of(folder) for folder in folders]


def from_flame(source: Path, output: Path, sequence_length: int) -> list[int]:
    """Writes traces in the layout of FLAME-MoE as traces of ours, a step for each iteration.

    Args:
        source: directory with ``samples`` and ``actives``.
        output: directory to create.
        sequence_length: tokens of a sequence, which is not in the files.

    Returns:
        The steps.

    Raises:
        UserError: files are missing or do not fit together.
    """
    from pyarrow import parquet

    from dynmoe.train.traces import step_directory

    tokens = _flame_tokens(source / "samples")
    if len(tokens) % sequence_length:
        raise UserError(f"--sequence-length={sequence_length}: does not divide the {len(tokens)} tokens; use a divisor")
    iterations = _numbered(source / "actives", r"iter_(\d+)")
    for step, folder in iterations:
        target = step_directory(output, step)
        target.mkdir(parents=True)
        writer = None
        for number, file in _numbered(folder, r"layer_(\d+)\.parquet"):
            for first, batch in _flame_batches(file, len(tokens)):
                own = tokens.slice(first, len(batch))
                table = _table(batch, own, step, number - 1, first, sequence_length, file)
                path = target / "rank_00000.parquet"
                writer = writer or parquet.ParquetWriter(path, table.schema, compression="zstd")
                writer.write_table(table)
        if writer is not None:
            writer.close()
    return [step for step, _ in iterations]


def _layers(folder: Path) -> list[int]:
    layers: list[int] = _read_step(folder, ["layer"])["layer"].unique().to_pylist()
    return sorted(layers)


def _layer_rows(folder: Path, layer: int) -> Any:
    """The rows of a layer by sample and position."""
    rows = _read_step(folder, ["sample", "position", "token", "experts", "gates"], [("layer", "=", layer)])
    return rows.sort_by([("sample", "ascending"), ("position", "ascending")])


def _read_step(folder: Path, columns: list[str], filters: list[tuple[str, str, int]] | None = None) -> Any:
    from pyarrow import parquet

    try:
        return parquet.read_table(folder, columns=columns, filters=filters).select(columns)
    except (OSError, ValueError, KeyError) as error:
        problem = f"cannot be read as a trace ({first_line(error)})"
        raise UserError(f"{folder}: {problem}; name the directory of a traced run") from None


def _actives(rows: Any) -> dict[str, Any]:
    """The columns ``scores`` and ``indices``, the highest score of a token first."""
    import pyarrow as pa

    token_N, expert_N, gate_N = _routes(rows["experts"], rows["gates"])
    order_N = gate_N.argsort(descending=True, stable=True)
    order_N = order_N[token_N[order_N].argsort(stable=True)]
    return {
        "scores": _of_tokens(token_N, gate_N[order_N].half(), len(rows), pa.float16()),
        "indices": _of_tokens(token_N, expert_N[order_N], len(rows), pa.int16()),
    }


def _of_tokens(token_N: Tensor, values_N: Tensor, num_tokens: int, kind: Any) -> Any:
    """An array of lists, of a fixed size if all are equally long."""
    import pyarrow as pa

    from dynmoe.train.traces import token_lists

    count_T = token_N.bincount(minlength=num_tokens)
    size = int(count_T[0])
    if size == 0 or bool((count_T != size).any()):
        return token_lists(token_N, values_N, num_tokens, kind)
    return pa.FixedSizeListArray.from_arrays(pa.array(values_N.numpy(), kind), size)


def _routes(experts: Any, gates: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Row, expert and gate of each entry of two columns of lists, in their order."""
    import torch
    from pyarrow import compute

    size_T = torch.tensor(compute.list_value_length(experts).to_numpy(zero_copy_only=False)).long()
    token_N = torch.arange(len(size_T)).repeat_interleave(size_T)
    flat = [compute.list_flatten(column).to_numpy(zero_copy_only=False) for column in (experts, gates)]
    return token_N, torch.tensor(flat[0]).long(), torch.tensor(flat[1]).float()


def _table(batch: Any, tokens: Any, step: int, layer: int, first: int, sequence_length: int, file: Path) -> Any:
    """The rows of a trace of ours from the rows of a layer that begin with token ``first``."""
    import torch
    from pyarrow import compute

    from dynmoe.train.traces import trace_table

    if not compute.list_value_length(batch["scores"]).equals(compute.list_value_length(batch["indices"])):
        raise UserError(f"{file}: has rows with more scores than indices or fewer; download the file again")
    token_N, expert_N, gate_N = _routes(batch["indices"], batch["scores"])
    if len(expert_N) and int(expert_N.min()) < 0:
        raise UserError(f"{file}: has index {int(expert_N.min())}, which is no expert; remove padding from the rows")
    order_N = expert_N.argsort(stable=True)
    order_N = order_N[token_N[order_N].argsort(stable=True)]
    row_T = torch.arange(first, first + len(batch))
    none_M = row_T[:0]
    return trace_table(
        step, layer, row_T // sequence_length, row_T % sequence_length, torch.tensor(tokens.to_numpy()),
        (token_N, expert_N[order_N]), gate_N[order_N], (none_M, none_M),
    )  # fmt: skip


def _flame_tokens(folder: Path) -> Any:
    """The tokens of all files, in the order of their names."""
    import pyarrow as pa

    files = [path for _, path in _numbered(folder, r"(\d+)\.parquet")]
    return pa.chunked_array([chunk for file in files for chunk in _read(file, ["token_id"])["token_id"].chunks])


def _flame_batches(file: Path, num_tokens: int) -> Iterator[tuple[int, Any]]:
    """The rows of a layer in parts, each with the number of its first row."""
    from pyarrow import parquet

    _read(file, ["scores", "indices"], head=True)
    rows = parquet.ParquetFile(file)
    if rows.metadata.num_rows != num_tokens:
        problem = f"has {rows.metadata.num_rows} rows for {num_tokens} tokens"
        raise UserError(f"{file}: {problem}; download the samples and actives of the same model")
    first = 0
    for batch in rows.iter_batches(_ROWS, columns=["scores", "indices"]):
        yield first, batch
        first += len(batch)


def _read(file: Path, columns: list[str], head: bool = False) -> Any:
    """The columns of a file; with ``head``, only checks that it has them."""
    from pyarrow import parquet

    try:
        missing = set(columns) - set(parquet.read_schema(file).names)
        if missing:
            raise ValueError(f"no column {', '.join(sorted(missing))}")
        return None if head else parquet.read_table(file, columns=columns)
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: is not a file of FLAME-MoE traces ({first_line(error)}); download it again") from None


def _numbered(folder: Path, pattern: str) -> list[tuple[int, Path]]:
    """The entries of a folder whose whole name matches, by the number in it."""
    entries = folder.iterdir() if folder.is_dir() else ()
    found = [(int(match[1]), path) for path in entries if (match := re.fullmatch(pattern, path.name))]
    if not found:
        name = pattern.replace(r"(\d+)", "N").replace("\\", "")
        raise UserError(f"{folder}: has no {name}; name a directory with samples and actives of a FLAME-MoE model")
    return sorted(found)


def _write(columns: dict[str, Any], path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table(columns), path, compression="zstd")


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m dynmoe.traces",
        description="Converts routing traces to the layout of the dataset CMU-FLAME/FLAME-MoE-Traces, and back.",
    )
    parser.add_argument("source", type=Path, metavar="SOURCE", help="run with traces, or a directory in that layout")
    parser.add_argument("output", type=Path, metavar="OUT", help="directory to create")
    parser.add_argument("--to", choices=("flame", "dynmoe"), required=True, help="layout of OUT")
    parser.add_argument("--step", type=int, help="flame: the step to convert (default: all, if their tokens are equal)")
    parser.add_argument(
        "--sequence-length", type=int, default=2048, metavar="S",
        help="dynmoe: tokens of a sequence (default: %(default)s, as FLAME-MoE)",
    )  # fmt: skip
    given = parser.parse_args()
    if given.step is not None and given.to != "flame":
        raise UserError(f"--step={given.step}: has no meaning for --to {given.to}, which converts all steps; omit it")
    if given.output.exists():
        raise UserError(f"{given.output}: exists; name a new directory")
    if given.sequence_length < 1:
        raise UserError(f"--sequence-length={given.sequence_length}: is too small; use at least 1")
    if not given.source.is_dir():
        raise UserError(f"{given.source}: does not exist; name a run, or a directory in the layout of FLAME-MoE")
    from dynmoe.train.traces import traces_of

    given.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=given.output.parent, prefix=f".{given.output.name}-") as folder:
        made = Path(folder) / "made"
        if given.to == "flame":
            steps = to_flame(traces_of(given.source), made, given.step)
        else:
            steps = from_flame(given.source, made, given.sequence_length)
        made.rename(given.output)
    print(f"{given.output}: step {', '.join(map(str, steps))} in the layout of {given.to}")


if __name__ == "__main__":
    run_tool(main)
