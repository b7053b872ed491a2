"""Autoregressive sampling."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dynmoe.model.cache import KeyValueCache
from dynmoe.model.decoder import Decoder

# Maps the latest tokens [B, S] to the logits [B, V] of the next token; remembers earlier tokens.
NextLogits = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters; tokens must pass both the top-k and the top-p filter.

    ``temperature`` 0 is greedy decoding; ``top_k`` 0 disables the top-k filter.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 1.0

    def draw(self, logits_BV: Tensor, generator: torch.Generator) -> Tensor:
        """Samples a token for each row of fp32 logits on the CPU, int64 [B]."""
        if self.temperature == 0:
            return logits_BV.argmax(dim=1)
        sorted_BV, order_BV = (logits_BV / self.temperature).sort(dim=1, descending=True, stable=True)
        probs_BV = sorted_BV.softmax(dim=1)
        mass_above_BV = probs_BV.cumsum(dim=1) - probs_BV
        excluded_BV = mass_above_BV >= self.top_p
        if self.top_k:
            excluded_BV[:, self.top_k :] = True
        excluded_BV[:, 0] = False
        drawn_B1 = torch.multinomial(probs_BV.masked_fill(excluded_BV, 0.0), 1, generator=generator)
        return order_BV.gather(1, drawn_B1).squeeze(1)


@torch.no_grad()
def sample(
    next_logits: NextLogits,
    prompts_BS: Tensor,
    num_tokens: int,
    *,
    vocab_size: int,
    sampling: Sampling = Sampling(),
    seed: int = 0,
) -> Iterator[Tensor]:
    """Yields the tokens [B] that continue ``prompts_BS``, ``num_tokens`` times.

    Args:
        next_logits: :func:`whole_context` or :func:`with_cache`. With expert parallelism, every rank must sample the
            same tokens, which the seeded generator on the CPU ensures.
        prompts_BS: tokens, padded on the left.
        num_tokens: length of each continuation.
        vocab_size: ids at or above it (padding rows of the embedding) are never sampled.
        sampling: sampling parameters.
        seed: seed of the generator.
    """
    generator = torch.Generator().manual_seed(seed)
    latest_BS = prompts_BS
    for _ in range(num_tokens):
        drawn_B = sampling.draw(next_logits(latest_BS)[:, :vocab_size].float().cpu(), generator)
        yield drawn_B
        latest_BS = drawn_B[:, None].to(prompts_BS.device)


def whole_context(logits_of: Callable[[Tensor], Tensor], sequence_length: int) -> NextLogits:
    """Computes a full forward pass for each token, over the last ``sequence_length`` tokens, without a cache."""
    so_far: list[Tensor] = []

    def next_logits(latest_BS: Tensor) -> Tensor:
        so_far[:] = [torch.cat([*so_far, latest_BS], dim=1)[:, -sequence_length:]]
        return logits_of(so_far[0])[:, -1]

    return next_logits


def with_cache(decoder: Decoder, padding_B: Tensor) -> NextLogits:
    """Computes each token once, with a key-value cache; the first ``padding_B`` positions are padding."""
    cache = KeyValueCache(decoder.settings.layers, padding_B)
    return lambda latest_BS: decoder.next_logits(latest_BS, cache)


def pad_left(prompts: Sequence[Sequence[int]], padding: int) -> tuple[Tensor, Tensor]:
    """Prompts as one tensor [B, S], and the number of padding positions of each."""
    longest = max(len(prompt) for prompt in prompts)
    rows = [[padding] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    return torch.tensor(rows), torch.tensor([longest - len(prompt) for prompt in prompts])
