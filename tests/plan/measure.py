"""Memory of a few training steps in fresh processes, under torchrun: -m tests.plan.measure RESULT key=value ..."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def _status(name: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def main() -> None:
    import torch
    import torch.distributed as dist

    from dynmoe.config import load_config
    from dynmoe.data.batches import Batch
    from dynmoe.engines import make_engine
    from dynmoe.ops import backends  # noqa: F401  (everything that is imported counts as there before)

    config = load_config(None, sys.argv[2:])
    torch.set_num_threads(1)
    # A model of a few parameters first: what libraries allocate once is not the model's.
    vocab_size = config.model.vocab_size
    assert vocab_size is not None
    if config.engine == "megatron":
        import dynmoe.engines.megatron.engine  # noqa: F401
    else:
        import dynmoe.engines.deepspeed  # noqa: F401
    x = torch.randn(8, 8, requires_grad=True)
    (x @ x).sum().backward()
    before = _status("VmRSS")
    engine = make_engine(config, vocab_size)
    made = _status("VmRSS") - before
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    rows = 0
    passes = config.accumulation(engine.world_size)
    for step in range(3):
        tokens = torch.randint(0, vocab_size, (config.train.micro_batch, config.data.sequence_length + 1))
        batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        engine.train_step([batch] * passes, 1e-4, record=step == 2)
    report = engine.report()
    rows = sum(report.routed_rows.values())
    peak = _status("VmHWM") - before
    tokens_seen = 3 * config.tokens_per_step * len(config.model.moe_layers)
    result = {"made": made, "peak": peak, "experts_per_token": rows / tokens_seen}
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, result)
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(gathered))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
