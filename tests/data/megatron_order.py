"""The oracle of the order of samples: Megatron-Core's own datasets, and its builder of corpora."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

__all__ = ["DType", "IndexedDatasetBuilder", "megatron_samples", "write_corpus"]


class _Vocabulary:
    vocab_size = 400
    eod = 2
    unique_identifiers: dict[str, str] = {}  # noqa: RUF012


def megatron_samples(
    prefixes: Sequence[Path], length: int, seed: int, cache: Path, weights: list[float] | None = None,
    size: int | None = None,
) -> np.ndarray[Any, Any]:  # fmt: skip
    """All samples of an epoch, [N, length + 1]. A blend needs a process group."""
    config = GPTDatasetConfig(
        random_seed=seed, sequence_length=length, path_to_cache=str(cache), tokenizer=_Vocabulary(),
        blend_per_split=[([str(prefix) for prefix in prefixes], weights), None, None],
        reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False,
    )  # fmt: skip
    built = BlendedMegatronDatasetBuilder(GPTDataset, [size, 0, 0], lambda: True, config).build()[0]
    samples = [built[n] for n in range(len(built))]
    return np.stack([np.append(sample["tokens"], sample["labels"][-1]) for sample in samples])


def write_corpus(prefix: Path, lengths: Sequence[int], seed: int) -> Path:
    """Writes a split of random tokens in sequences of these lengths."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", DType.optimal_dtype(_Vocabulary.vocab_size))
    for length in lengths:
        builder.add_document(torch.randint(3, 400, (length,), generator=generator), [length])
    builder.finalize(f"{prefix}.idx")
    return prefix
