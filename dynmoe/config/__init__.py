"""The configuration: typed dataclasses and one merge (defaults < YAML file < command line).

Each field carries its meaning and its bounds, which ``--help`` and the validation share. A section validates itself
when it is created and never modifies given values; derived values are properties. The package does not import torch, so
that mistakes are reported before heavy imports and before any process group exists.
"""

from dynmoe.config.load import current_name, describe_fields, load_config
from dynmoe.config.model import ModelConfig, MoEConfig
from dynmoe.config.sections import Config, DataConfig, OptimizerConfig, ScheduleConfig

__all__ = [
    "Config",
    "DataConfig",
    "MoEConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ScheduleConfig",
    "current_name",
    "describe_fields",
    "load_config",
]
