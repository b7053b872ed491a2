"""The Megatron-Core engine."""

import torch

if not torch.cuda.is_available():
    from dynmoe.engines.megatron import cpu as cpu  # must precede every other use of Megatron
