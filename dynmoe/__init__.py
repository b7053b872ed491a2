"""DynMoE: pretraining of mixture-of-experts models with a dynamic number of experts per token."""

__version__ = "0.1.0"
