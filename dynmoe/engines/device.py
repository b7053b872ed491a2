"""The GPU of a rank."""

from __future__ import annotations

import os

import torch

from dynmoe.errors import UserError


def take_gpu(other_cure: str = "") -> torch.device:
    """Makes the GPU of this rank's number on its host the current one.

    Raises:
        UserError: more ranks on this host than GPUs; ``other_cure`` is said after the obvious one.
    """
    ranks, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if ranks > gpus:
        cure = f"start {gpus} with --nproc-per-node{other_cure}"
        raise UserError(f"{ranks} ranks on this host, but {gpus} GPU(s); {cure}")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device
