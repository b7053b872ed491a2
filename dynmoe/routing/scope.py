"""The tokens among which a router selects, if the choice for a token depends on other tokens."""

from __future__ import annotations

from torch import Tensor


class TokenScope:
    """The tokens of a forward pass, all of them on this rank; a subclass spreads them over ranks.

    A router whose selection depends on other tokens reaches those of other ranks only through this class.

    Args:
        num_sequences: number of sequences; tokens of a sequence are contiguous.
    """

    def __init__(self, num_sequences: int = 1) -> None:
        self.num_sequences = num_sequences

    def sum(self, local: Tensor) -> Tensor:
        """The sum of ``local`` over all ranks that hold tokens of this forward pass; constant to autograd."""
        return local

    def sequences(self, values_TE: Tensor) -> Tensor:
        """The values of this rank's sequences, each of them whole, [B, S, E]; constant to autograd."""
        return values_TE.detach().unflatten(0, (self.num_sequences, -1))

    def own(self, values_BSE: Tensor) -> Tensor:
        """The part of whole sequences that is of this rank's tokens, [T, E]."""
        return values_BSE.flatten(0, 1)
