"""The mixture-of-experts layer: router, dispatcher and experts."""

from dynmoe.moe.context import MoEContext, MoEGroups, StepState
from dynmoe.moe.layer import MoELayer

__all__ = ["MoEContext", "MoEGroups", "MoELayer", "StepState"]
