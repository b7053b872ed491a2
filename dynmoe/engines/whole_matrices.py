"""Muon's updates where each rank holds parts of matrices: every matrix is orthogonalized whole, on one rank.

The parts of a matrix travel to its rank and its update travels back, by one all-to-all each for a parameter group. So
ranks share the work instead of repeating it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor

from dynmoe.train.muon import orthogonalize, rms_factor

_BATCH_ELEMENTS = 2**25  # orthogonalized at a time; bounds the temporary memory


@dataclass(frozen=True)
class Unit:
    """Matrices that one rank orthogonalizes: a parameter, or one expert of a stacked parameter.

    Attributes:
        shape: of a tensor-parallel shard.
        shards: number of shards.
        join: converts the shards to the weight of the plain model, [rows, columns].
        split: the inverse of ``join``.
        rows: of the matrices that this weight holds, one below the other.
    """

    shape: tuple[int, ...]
    shards: int
    join: Callable[[list[Tensor]], Tensor]
    split: Callable[[Tensor], list[Tensor]]
    rows: tuple[int, ...]

    @classmethod
    def unsharded(cls, shape: tuple[int, ...], rows: tuple[int, ...]) -> Unit:
        return cls(shape, 1, lambda shards: shards[0], lambda whole: [whole], rows)

    @property
    def size(self) -> int:
        """Number of elements of a shard."""
        return self.shape[0] * self.shape[1]

    @property
    def cost(self) -> int:
        """Proportional to the arithmetic of orthogonalization."""
        columns = self.size * self.shards // sum(self.rows)
        return sum(rows * columns * min(rows, columns) for rows in self.rows)


@dataclass(frozen=True, order=True)
class Part:
    """Consecutive elements of a flattened shard that one rank updates, or several alike."""

    unit: int
    shard: int
    start: int
    length: int


@dataclass(frozen=True)
class Place:
    """Where a rank holds a part: in tensor number ``tensor`` of the parameter group, flattened, from ``offset`` on."""

    tensor: int
    offset: int


def held_by_unit(
    first: int, size: int, shard: int, start: int, length: int, place: Place
) -> Iterator[tuple[Part, Place]]:
    """The parts of consecutive elements of a parameter, which may be stacked.

    Args:
        first: index of its first unit.
        size: elements of a unit's shard.
        shard: this rank's tensor-parallel rank.
        start, length: the elements, of the flattened parameter.
        place: of the first of them.
    """
    end = start + length
    while start < end:
        unit, offset = divmod(start, size)
        taken = min(size - offset, end - start)
        yield Part(first + unit, shard, offset, taken), place
        start += taken
        place = Place(place.tensor, place.offset + taken)


class MatrixExchange:
    """Implements :data:`dynmoe.train.muon.Orthogonalize` for a parameter group; collective over its ranks.

    Args:
        units: of the group, the same on all its ranks.
        held: the parts that this rank holds.
        ranks: the ranks that hold parts of the units; None for this one alone.
        dtype: in which parts travel and matrices are orthogonalized.
        device: of the tensors.
    """

    def __init__(
        self, units: Sequence[Unit], held: Iterable[tuple[Part, Place]], ranks: dist.ProcessGroup | None,
        dtype: torch.dtype, device: torch.device,
    ) -> None:  # fmt: skip
        self._units = units
        self._places = dict(held)
        self._ranks = ranks
        self._dtype = dtype
        self._device = device
        held_by_rank = [sorted(self._places)]
        rank = 0
        if ranks is not None:
            rank = dist.get_rank(ranks)
            held_by_rank = [[] for _ in range(dist.get_world_size(ranks))]
            dist.all_gather_object(held_by_rank, sorted(self._places), group=ranks)
        owner = _owners(units, len(held_by_rank))
        sender: dict[Part, int] = {}
        for number, parts in enumerate(held_by_rank):
            for part in parts:  # of several holders the owner, which need not send it, else the first
                if number == owner[part.unit] or part not in sender:
                    sender[part] = number
        assert sum(part.length for part in sender) == sum(unit.size * unit.shards for unit in units)
        everyone = range(len(held_by_rank))
        held_here = held_by_rank[rank]
        self._sent = [[p for p in held_here if sender[p] == rank and owner[p.unit] == other] for other in everyone]
        self._owned = [[p for p in held_by_rank[other] if sender[p] == other and owner[p.unit] == rank]
                       for other in everyone]  # fmt: skip
        self._returned = [[p for p in held_by_rank[other] if owner[p.unit] == rank] for other in everyone]
        self._received = [[p for p in held_here if owner[p.unit] == other] for other in everyone]

    def __call__(self, momenta: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Replaces the momenta, which are contiguous, by the updates."""
        arrived = self._travel(self._values(momenta, gradients), self._sent, self._owned)
        updates = self._travel(self._orthogonalized(arrived), self._returned, self._received)
        for part, update in updates.items():
            self._own(momenta, part).copy_(update)

    def _values(self, momenta: Sequence[Tensor], gradients: Sequence[Tensor]) -> dict[Part, Tensor]:
        """What is orthogonalized of each part that this rank holds.

        It is zero where the gradient is zero in the whole part, so that an expert without tokens stands still:
        orthogonalization would give full size even to a momentum that has faded.
        """
        return {
            part: (self._own(momenta, part) * self._own(gradients, part).any()).to(self._dtype) for part in self._places
        }

    def _own(self, tensors: Sequence[Tensor], part: Part) -> Tensor:
        place = self._places[part]
        return tensors[place.tensor].view(-1)[place.offset : place.offset + part.length]

    def _travel(
        self, values: Mapping[Part, Tensor], sent: list[list[Part]], received: list[list[Part]]
    ) -> dict[Part, Tensor]:
        """Sends the values of the parts ``sent[r]`` to each rank r; returns those of the parts ``received[r]``."""
        arriving = list(chain.from_iterable(received))
        if self._ranks is None:
            return {part: values[part] for part in arriving}
        nothing = torch.empty(0, dtype=self._dtype, device=self._device)
        outgoing = torch.cat([nothing, *(values[part] for part in chain.from_iterable(sent))])
        incoming = outgoing.new_empty(sum(part.length for part in arriving))
        dist.all_to_all_single(incoming, outgoing, _lengths(received), _lengths(sent), group=self._ranks)
        return dict(zip(arriving, incoming.split([part.length for part in arriving]), strict=True)) if arriving else {}

    def _orthogonalized(self, owned: Mapping[Part, Tensor]) -> dict[Part, Tensor]:
        """The updates of this rank's units, by part."""
        shards: dict[int, list[Tensor]] = {}
        for part, value in owned.items():
            unit = self._units[part.unit]
            if part.unit not in shards:
                shards[part.unit] = [value.new_empty(unit.shape) for _ in range(unit.shards)]
            shards[part.unit][part.shard].view(-1)[part.start : part.start + part.length] = value
        whole = {number: self._units[number].join(own) for number, own in shards.items()}
        _orthogonalize(matrix for number, weight in whole.items() for matrix in weight.split(self._units[number].rows))
        for number, weight in whole.items():
            shards[number] = self._units[number].split(weight)
        return {part: shards[part.unit][part.shard].flatten()[part.start : part.start + part.length] for part in owned}


def _lengths(parts_by_rank: list[list[Part]]) -> list[int]:
    return [sum(part.length for part in parts) for parts in parts_by_rank]


def _owners(units: Sequence[Unit], ranks: int) -> list[int]:
    """The rank that orthogonalizes each unit: expensive units first, each to the rank with the least to do."""
    load = [0] * ranks
    owner = [0] * len(units)
    for number in sorted(range(len(units)), key=lambda number: (-units[number].cost, number)):
        owner[number] = load.index(min(load))
        load[owner[number]] += units[number].cost
    return owner


def _orthogonalize(matrices: Iterable[Tensor]) -> None:
    """Replaces matrices by their updates, those of one shape together."""
    by_shape: dict[tuple[int, int], list[Tensor]] = {}
    for matrix in matrices:
        by_shape.setdefault((matrix.shape[0], matrix.shape[1]), []).append(matrix)
    for (rows, columns), alike in by_shape.items():
        count = max(1, _BATCH_ELEMENTS // (rows * columns))
        for start in range(0, len(alike), count):
            batch = alike[start : start + count]
            updates = orthogonalize(torch.stack(batch)) * rms_factor(rows, columns)
            for matrix, update in zip(batch, updates, strict=True):
                matrix.copy_(update)
