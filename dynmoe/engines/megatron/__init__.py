"""The Megatron-Core engine."""

import warnings

import torch

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
    import megatron.core  # noqa: F401  (what it loads would warn)

if not torch.cuda.is_available():
    from dynmoe.engines.megatron import cpu as cpu  # must precede every other use of Megatron
