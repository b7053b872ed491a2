"""The GPU of a rank."""

from __future__ import annotations

import os

import torch

from dynmoe.errors import UserError


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
