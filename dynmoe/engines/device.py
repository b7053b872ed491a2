"""The device of a rank."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from dynmoe.config import Config
from dynmoe.errors import UserError
from dynmoe.ops import configured_backend


def take_gpu(other_cure: str = "") -> torch.device:
    """Selects the GPU of this rank's number on the host.

    Raises:
        UserError: this host has more ranks than GPUs; ``other_cure`` is appended to the suggested fix.
    """
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    gpus = torch.cuda.device_count()
    if ranks > gpus:
        cure = f"start {gpus} with --nproc-per-node{other_cure}"
        raise UserError(f"{ranks} ranks on this host, but {gpus} GPU(s); {cure}")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def check_backend(config: Config | None, device: torch.device) -> None:
    """Checks, before ranks connect, that the experts of a run can be computed on its device.

    Raises:
        ConfigError: they cannot; not if the process group exists already, as in a dry start, whose device is another.
    """
    if config is not None and config.model.moe_layers and not dist.is_initialized():
        configured_backend(config, device)
