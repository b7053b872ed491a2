"""Measures the memory of a training step; under torchrun: -m tests.plan.measure RESULT key=value ..."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from dynmoe.config import load_config
from dynmoe.data.batches import Batch
from dynmoe.engines import make_engine
from dynmoe.train.engine import take_step
from harness.memory import peak_bytes


def bytes_of_tensors() -> int:
    """Bytes of all existing tensors, counting shared storage once."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.device.type != "meta":
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def main() -> None:
    """Measures the second step, after the first has made its persistent allocations."""
    config = load_config(None, sys.argv[2:])
    torch.set_num_threads(1)
    vocab_size = config.model.vocab_size
    assert vocab_size is not None
    engine = make_engine(config, vocab_size)
    torch.manual_seed(0)
    tokens = torch.randint(0, vocab_size, (config.train.micro_batch, config.data.sequence_length + 1))
    batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    batches = [batch] * config.accumulation(engine.world_size)
    take_step(engine, batches, 1e-4)
    engine.report()
    static = bytes_of_tensors()
    peak = static + peak_bytes(lambda: take_step(engine, batches, 1e-4))
    sent = engine.report().sent_bytes / engine.world_size
    gathered: list[dict[str, float] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, {"static": static, "peak": peak, "sent": sent})
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(gathered))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
