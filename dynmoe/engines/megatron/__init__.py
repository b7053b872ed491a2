"""The Megatron-Core engine."""

import sys
import warnings

import torch

if not torch.cuda.is_available():
    # Megatron takes their optimizers wherever they are installed, and those need a GPU.
    sys.modules |= dict.fromkeys(("transformer_engine", "apex"))  # type: ignore[arg-type]  # None: no such package

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
    import megatron.core  # noqa: F401  (what it loads would warn)

if not torch.cuda.is_available():
    from dynmoe.engines.megatron import cpu as cpu  # must precede every other use of Megatron
