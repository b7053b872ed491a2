"""The configuration: typed dataclasses and one merge (defaults < YAML file < command line).

Every field carries its meaning and its bounds, so that ``--help``, the validation and the code cannot drift apart. A
section checks itself when it is made and never changes what it was given; what derives is a property. Imports no
torch: a mistake is reported before anything heavy is loaded or any process group exists.
"""

from dynmoe.config.load import describe_fields, load_config
from dynmoe.config.sections import (
    Config,
    ModelConfig,
    OptimizerConfig,
    RouterConfig,
    ScheduleConfig,
)

__all__ = [
    "Config",
    "ModelConfig",
    "OptimizerConfig",
    "RouterConfig",
    "ScheduleConfig",
    "describe_fields",
    "load_config",
]
