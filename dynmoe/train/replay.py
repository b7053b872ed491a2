"""Reads the routing traces of another run, so that its experts are used in this run (``train.replay``).

The layout of the traced run does not matter: routes are looked up by layer, sample and position. A trace must have the
columns ``layer``, ``sample``, ``position``, ``token``, ``experts`` and ``dropped`` (:mod:`dynmoe.train.traces`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynmoe.data.batches import Batch
from dynmoe.errors import UserError, first_line
from dynmoe.moe import MoELayer
from dynmoe.moe.replay import DROPPED, ROUTED, RoutingReplay
from dynmoe.train.traces import step_directory, traces_of
from dynmoe.train.verification import gather_ranks

_SAME_DATA = "replay with the data, train.seed, train.global_batch and data.sequence_length of the traced run"


class ReplaySource:
    """The traces of another run.

    Args:
        replay: ``train.replay``.
        own: directory of this run's traces, which would be overwritten while they are read.

    Raises:
        UserError: ``replay`` has no traces, or they are this run's own.
    """

    def __init__(self, replay: str, own: Path) -> None:
        if not Path(replay).is_dir():
            raise UserError(f"train.replay={replay}: does not exist; name the directory of a traced run")
        self._replay = replay
        self._traces = traces_of(Path(replay))
        if not any(self._traces.glob("step_*")):
            raise UserError(f"train.replay={replay}: has no traces; name a run that was trained with --trace")
        if self._traces.resolve() == own.resolve():
            raise UserError(f"train.replay={replay}: are this run's own traces; use another run.name")

    def check_steps(self, first: int, last: int) -> None:
        """Raises a UserError unless steps ``first`` to ``last`` are traced."""
        for step in range(first, last + 1):
            if not step_directory(self._traces, step).is_dir():
                cure = "trace every step (logging.trace_interval=1)"
                cure += f", or use train.steps={step - 1}" if step > first else ""
                raise UserError(f"train.replay={self._replay}: has no trace of step {step}; {cure}")

    def read(
        self, step: int, layers: Sequence[MoELayer], samples: Sequence[range], batches: Sequence[Batch],
        positions_P: Tensor,
    ) -> RoutingReplay:  # fmt: skip
        """The routes of a step on this rank; collective.

        Args:
            step: number of the optimizer step.
            layers: MoE layers of this rank.
            samples: numbers of the sequences of each micro-batch, ascending.
            batches: the micro-batches.
            positions_P: positions in a sequence that this rank computes, in its order.

        Raises:
            UserError: the trace lacks a token of the step on any rank, has another token there, or uses an expert that
                this run does not have; the same on every rank.
        """
        replay = None
        problem = None
        try:
            replay = read_step(step_directory(self._traces, step), layers, samples, batches, positions_P)
        except UserError as error:
            problem = str(error)
        problems = [problem for problem in gather_ranks(problem) if problem is not None]
        if problems:
            raise UserError(f"train.replay: {problems[0]}")
        assert replay is not None
        return replay


def read_step(
    folder: Path, layers: Sequence[MoELayer], samples: Sequence[range], batches: Sequence[Batch], positions_P: Tensor
) -> RoutingReplay:
    """The routes of a step on this rank from the Parquet files in ``folder``; see :meth:`ReplaySource.read`."""
    replay = RoutingReplay()
    if not layers:  # a pipeline stage of dense layers
        return replay
    wanted = _Wanted(samples, batches, positions_P)
    table = _read_table(folder, layers, samples)
    layer_N = torch.tensor(table["layer"].to_numpy())
    for layer in layers:
        rows = table.filter((layer_N == layer.layer).numpy())
        if not len(rows):
            raise UserError(f"{folder}: has no layer {layer.layer}; replay a run whose MoE layers are the same")
        try:
            kinds_TE = wanted.kinds(rows, layer.router.active_E.cpu())
        except UserError as error:
            raise UserError(f"{folder}: layer {layer.layer}: {error}") from None
        for number, own_TE in enumerate(kinds_TE.chunk(len(batches))):
            replay.add(layer.layer, number, own_TE)
    return replay


def _read_table(folder: Path, layers: Sequence[MoELayer], samples: Sequence[range]) -> Any:
    """The rows of these layers and samples, and possibly of others between them."""
    from pyarrow import parquet  # imported here, as only traces need it

    columns = ["layer", "sample", "position", "token", "experts", "dropped"]
    filters = [
        ("layer", ">=", layers[0].layer), ("layer", "<=", layers[-1].layer),
        ("sample", ">=", samples[0].start), ("sample", "<", samples[-1].stop),
    ]  # fmt: skip
    try:
        return parquet.read_table(folder, columns=columns, filters=filters).select(columns)
    except (OSError, ValueError, KeyError) as error:
        cure = "name the directory of a traced run"
        raise UserError(f"{folder}: cannot be read as a trace ({first_line(error)}); {cure}") from None


class _Wanted:
    """The tokens of a step on this rank: those of its micro-batches one after another, T in all."""

    def __init__(self, samples: Sequence[range], batches: Sequence[Batch], positions_P: Tensor) -> None:
        self._sample_B = torch.cat([torch.arange(own.start, own.stop) for own in samples])
        self._positions_P = positions_P
        self._token_T = torch.cat([batch.tokens_BS[:, positions_P] for batch in batches]).flatten()
        self._place_S = torch.full((batches[0].tokens_BS.shape[1],), -1)
        self._place_S[positions_P] = torch.arange(len(positions_P))

    def kinds(self, rows: Any, active_E: Tensor) -> Tensor:
        """The routes of one layer as :meth:`RoutingReplay.add` takes them, of all micro-batches.

        Raises:
            UserError: a token is missing, twice in the trace, or another one; or an expert is not active.
        """
        place_N = self._places(rows)
        held_N = place_N >= 0
        rows = rows.filter(held_N.numpy())
        place_N = place_N[held_N]
        self._check_once(place_N)
        self._check_tokens(place_N, torch.tensor(rows["token"].to_numpy()))
        kinds_TE = torch.zeros(len(self._token_T), len(active_E), dtype=torch.uint8)
        for column, kind in (("experts", ROUTED), ("dropped", DROPPED)):
            place_M, expert_M = _routes(rows[column], place_N)
            self._check_experts(place_M, expert_M, active_E)
            kinds_TE[place_M, expert_M] = kind
        return kinds_TE

    def _places(self, rows: Any) -> Tensor:
        """The token of each row, or -1 if this rank does not compute it."""
        sample_N = torch.tensor(rows["sample"].to_numpy())
        position_N = torch.tensor(rows["position"].to_numpy()).long()
        row_N = torch.searchsorted(self._sample_B, sample_N).clamp(max=len(self._sample_B) - 1)
        inside_N = (position_N >= 0) & (position_N < len(self._place_S))
        column_N = self._place_S[position_N.where(inside_N, 0)]
        held_N = (self._sample_B[row_N] == sample_N) & inside_N & (column_N >= 0)
        return (row_N * len(self._positions_P) + column_N).where(held_N, -1)

    def _check_once(self, place_N: Tensor) -> None:
        count_T = place_N.bincount(minlength=len(self._token_T))
        for wrong_T, problem, cure in (
            (count_T == 0, "is missing", _SAME_DATA),
            (count_T > 1, "is there twice", "remove the files of other runs"),
        ):
            if wrong_T.any():
                raise UserError(f"{self._name(int(wrong_T.int().argmax()))} {problem}; {cure}")

    def _check_tokens(self, place_N: Tensor, token_N: Tensor) -> None:
        differs_N = self._token_T[place_N] != token_N
        if differs_N.any():
            place = int(place_N[differs_N].min())
            traced = int(token_N[place_N == place])
            problem = f"is token {traced}, but {int(self._token_T[place])} in this run"
            raise UserError(f"{self._name(place)} {problem}; {_SAME_DATA}")

    def _check_experts(self, place_M: Tensor, expert_M: Tensor, active_E: Tensor) -> None:
        known_M = (expert_M >= 0) & (expert_M < len(active_E))
        known_M &= active_E[expert_M.where(known_M, 0)]
        if not known_M.all():
            first = int((~known_M).int().argmax())
            problem = f"uses expert {int(expert_M[first])}, which is not active in this run"
            cure = "start from a checkpoint of the traced run, or replay a run with these experts"
            raise UserError(f"{self._name(int(place_M[first]))} {problem}; {cure}")

    def _name(self, place: int) -> str:
        row, column = divmod(place, len(self._positions_P))
        return f"position {int(self._positions_P[column])} of sample {int(self._sample_B[row])}"


def _routes(lists: Any, place_N: Tensor) -> tuple[Tensor, Tensor]:
    """Token and expert of every entry of a column of lists; ``place_N`` is the token of each row."""
    from pyarrow import compute

    size_N = torch.tensor(compute.list_value_length(lists).to_numpy()).long()
    experts_M = torch.tensor(compute.list_flatten(lists).to_numpy()).long()
    return place_N.repeat_interleave(size_N), experts_M
