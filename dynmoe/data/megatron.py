"""Imports the parts of ``megatron.core.datasets`` in use, without their warnings. They need no GPU."""

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
    """numpy for Megatron's index files, without unpickling: a pickle can execute arbitrary code."""

    def __getattr__(self, name: str) -> Any:
        return getattr(numpy, name)

    @staticmethod
    def load(path: str, allow_pickle: bool, **options: Any) -> Any:
        try:
            return numpy.load(path, allow_pickle=False, **options)
        except ValueError:
            raise UserError(f"{path}: is not an array of numbers; delete its directory, it will be rebuilt") from None


blended_dataset.numpy = gpt_dataset.numpy = _NumpyWithoutPickles()
