"""The parts of ``megatron.core.datasets`` in use. They need no GPU; importing them says so at length, unless hushed."""

from __future__ import annotations

import warnings

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

__all__ = ["BlendedMegatronDatasetBuilder", "DType", "GPTDataset", "GPTDatasetConfig", "IndexedDatasetBuilder"]
