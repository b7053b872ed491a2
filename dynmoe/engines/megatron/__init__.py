"""Megatron-Core as an engine."""

import torch

if not torch.cuda.is_available():
    from dynmoe.engines.megatron import cpu as cpu  # before anything else of Megatron runs
