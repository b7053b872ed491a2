"""Megatron-Core as an engine."""

import logging
import warnings

import torch

# Megatron says at import, and in each layer, what it would rather have; the engine asks for none of it.
warnings.filterwarnings("ignore", category=UserWarning, module="megatron")
logging.getLogger("megatron.core.transformer.transformer_layer").setLevel(logging.ERROR)

if not torch.cuda.is_available():
    from dynmoe.engines.megatron import cpu as cpu  # before anything else of Megatron runs
