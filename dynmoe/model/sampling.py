"""Text from a model, the plain way: one full forward pass per token."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


@torch.no_grad()
def sample(
    logits_of: Callable[[Tensor], Tensor],
    prompt: list[int],
    num_tokens: int,
    *,
    vocab_size: int,
    sequence_length: int,
    temperature: float = 0.8,
    top_k: int = 40,
    seed: int = 0,
) -> list[int]:
    """Continues ``prompt`` by ``num_tokens`` tokens.

    Args:
        logits_of: maps tokens [1, S] to logits [1, S, V]; with expert parallelism every rank must sample alike, which
            the seeded generator on the CPU sees to.
        vocab_size: ids at or above it (padding rows of the embedding) are never drawn.
        sequence_length: the context is cut to its last ``sequence_length`` tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    for _ in range(num_tokens):
        context = torch.tensor([tokens[-sequence_length:]])
        logits_V = logits_of(context)[0, -1, :vocab_size].float().cpu() / temperature
        floor = logits_V.topk(min(top_k, vocab_size)).values[-1]
        probs_V = logits_V.masked_fill(logits_V < floor, float("-inf")).softmax(dim=0)
        tokens.append(int(torch.multinomial(probs_V, 1, generator=generator)))
    return tokens[len(prompt) :]
