"""The parts of ``megatron.core.datasets`` in use. They need no GPU; importing them says so at length, unless hushed."""

from __future__ import annotations

import warnings
from typing import Any

import numpy

from dynmoe.errors import UserError

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
    from megatron.core.datasets import blended_dataset, gpt_dataset
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

__all__ = ["BlendedMegatronDatasetBuilder", "DType", "GPTDataset", "GPTDatasetConfig", "IndexedDatasetBuilder"]


class _NumpyWithoutPickles:
    """numpy for Megatron's index files, which it unpickles where they are no arrays: a pickle can call anything."""

    def __getattr__(self, name: str) -> Any:
        return getattr(numpy, name)

    @staticmethod
    def load(path: str, allow_pickle: bool, **options: Any) -> Any:
        try:
            return numpy.load(path, allow_pickle=False, **options)
        except ValueError:
            raise UserError(f"{path}: is no array of numbers; remove the directory, which is made again") from None


blended_dataset.numpy = gpt_dataset.numpy = _NumpyWithoutPickles()
