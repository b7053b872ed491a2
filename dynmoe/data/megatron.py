"""Imports the parts of ``megatron.core.datasets`` in use, without their warnings. They need no GPU."""

from __future__ import annotations

import warnings

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
    from megatron.core.datasets import helpers

__all__ = ["helpers"]
