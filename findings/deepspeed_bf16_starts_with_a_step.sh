#!/usr/bin/env bash
# DeepSpeed takes an optimizer step when it starts in bf16 without ZeRO, which decays the initial weights.
#
# Expected: deepspeed.initialize leaves the optimizer before its first step: its fp32 weights are those of the model.
# Observed: In bf16 with ZeRO stage 0, it steps once with gradients of zero. A decoupled weight decay (AdamW) then
# multiplies every fp32 weight by 1 - lr * weight_decay, with the learning rate of the optimizer and not with that of a
# warmup. The weights of the model stay, so the first forward pass sees other weights than the first update. Adam also
# counts the step, so that the first update has the bias correction of the second. ZeRO 1 and 2 do neither, nor does
# stage 0 in fp32.
#
# Seen with torch 2.13.0, deepspeed 0.19.8 (AdamW with a learning rate of 0.1 and a weight decay of 0.5), before any step:
#   bf16, stage 0: fp32 weights are 0.950 of the initial ones, steps counted 1
#   bf16, stage 1: fp32 weights are 1.000 of the initial ones, steps counted 0
#   bf16, stage 2: fp32 weights are 1.000 of the initial ones, steps counted 0
#   fp32, stage 0: fp32 weights are 1.000 of the initial ones, steps counted 0
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install -qq torch==2.13.0 setuptools
venv/bin/python -m pip install -qq deepspeed==0.19.8

cat > start.py <<'END'
"""Starts an engine and prints its fp32 weights relative to the initial ones: start.py bf16|fp32 ZERO_STAGE"""
import logging
import sys

logging.disable(logging.WARNING)
import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param

precision, stage = sys.argv[1], int(sys.argv[2])
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # needs no compiler
deepspeed.init_distributed("gloo", verbose=False)
model = torch.nn.Linear(8, 8, bias=False)
torch.nn.init.constant_(model.weight, 2.0)  # exact in bf16
adam = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
engine, optimizer, *_ = deepspeed.initialize(
    model=model, optimizer=adam,
    config={
        "train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": precision == "bf16"},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 4096, "allgather_bucket_size": 4096},
    },
)  # fmt: skip
(parameter,) = engine.module.parameters()
if stage:
    weights = safe_get_full_fp32_param(parameter)
elif precision == "bf16":
    weights = optimizer.fp32_groups[0][0]
else:
    weights = parameter
steps = max((int(state["step"]) for state in adam.state.values() if "step" in state), default=0)
ratio = (weights.detach().float() / 2.0).unique().item()
print(f"{precision}, stage {stage}: fp32 weights are {ratio:.3f} of the initial ones, steps counted {steps}")
assert parameter.unique().item() == 2.0  # the model's own weights are the initial ones
expected = (0.95, 1) if (precision, stage) == ("bf16", 0) else (1.0, 0)
assert (round(ratio, 3), steps) == expected, f"expected {expected}"
dist.destroy_process_group()
END

export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1
for case in "bf16 0" "bf16 1" "bf16 2" "fp32 0"; do
    # shellcheck disable=SC2086
    venv/bin/torchrun --standalone --nproc-per-node 1 start.py $case 2> log || { cat log >&2; exit 1; }
done
