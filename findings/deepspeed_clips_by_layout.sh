#!/usr/bin/env bash
# DeepSpeed's gradient clipping depends on the layout under expert parallelism (without ZeRO).
#
# Expected: gradient_clipping 0.1 scales a larger gradient to a norm of 0.1, and the same model, batch and settings give
# the same step whether the experts are on one rank or on two.
# Observed: Without ZeRO (stage 0, fp32), each rank computes the norm of its own parameters, and the norms of the ranks
# are averaged. The squares of different experts should be summed instead. If experts dominate the norm, the clipped
# gradient under EP n is up to √n times too large: EP 8 clips at almost three times the limit of EP 1 or of ZeRO 1, which
# sums the squares. There is no warning.
#
# Seen with torch 2.13.0, deepspeed 0.19.8 (two experts, SGD with a learning rate of 1, so that a step is the gradient):
#   ZeRO 0: EP 1 steps by 0.1000, EP 2 by 0.1404; unclipped gradients agree within 5e-08
#   ZeRO 1: EP 1 steps by 0.1000, EP 2 by 0.1000; unclipped gradients agree within 5e-08
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install -qq torch==2.13.0 setuptools
venv/bin/python -m pip install -qq deepspeed==0.19.8

cat > rank.py <<'END'
"""One step of SGD on one rank; saves by how much it moved every parameter: rank.py ZERO_STAGE CLIPPING"""
import logging
import sys

logging.disable(logging.WARNING)
import deepspeed
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

stage, clipping = int(sys.argv[1]), float(sys.argv[2])
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # needs no compiler
deepspeed.init_distributed("gloo", verbose=False)
rank, world = dist.get_rank(), dist.get_world_size()


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.moe = MoE(16, torch.nn.Linear(16, 16), num_experts=2, ep_size=world, k=1, drop_tokens=False)
        torch.manual_seed(0)
        torch.nn.init.normal_(self.moe.deepspeed_moe.gate.wg.weight)
        for number, expert in enumerate(self.moe.deepspeed_moe.experts.deepspeed_experts):
            torch.manual_seed(1 + rank * (2 // world) + number)
            expert.reset_parameters()

    def forward(self, x_TD, y_TD):
        return (self.moe(x_TD)[0] - y_TD).square().mean()


model = Model()
groups = split_params_into_different_moe_groups_for_optimizer({"params": list(model.parameters()), "name": "all"})
batch = torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(9)).chunk(world, dim=1)[rank]
engine, *_ = deepspeed.initialize(
    model=model, optimizer=torch.optim.SGD(groups, lr=1.0),
    config={
        "train_micro_batch_size_per_gpu": 64 // world, "gradient_clipping": clipping,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 4096, "allgather_bucket_size": 4096},
        "zero_allow_untested_optimizer": True,
    },
)  # fmt: skip
before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
engine.backward(engine(*batch))
engine.step()
moved = {}
for name, parameter in model.named_parameters():
    start = before[name]
    head, _, tail = name.partition("deepspeed_experts.")
    if tail:  # local numbers of experts become global ones
        number, _, rest = tail.partition(".")
        name = f"{head}deepspeed_experts.{int(number) + rank * (2 // world)}.{rest}"
    moved[name] = parameter.detach() - start
torch.save(moved, f"moved-{stage}-{clipping}-{world}-{rank}.pt")
dist.destroy_process_group()
END

export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1
for stage in 0 1; do
    for clipping in 0.0 0.1; do
        for world in 1 2; do
            venv/bin/torchrun --standalone --nproc-per-node "$world" rank.py "$stage" "$clipping" > log 2>&1 ||
                { cat log >&2; exit 1; }
        done
    done
done

venv/bin/python - <<'END'
import torch


def moved(stage: int, clipping: float, world: int) -> torch.Tensor:
    """By how much the step moved every parameter of the whole model, each once."""
    parts = {}
    for rank in range(world):
        parts |= torch.load(f"moved-{stage}-{clipping}-{world}-{rank}.pt")
    return torch.cat([parts[name].flatten() for name in sorted(parts)])


for stage in (0, 1):
    whole, spread = moved(stage, 0.0, 1), moved(stage, 0.0, 2)
    difference = ((whole - spread).norm() / whole.norm()).item()
    norms = [moved(stage, 0.1, world).norm().item() for world in (1, 2)]
    print(
        f"ZeRO {stage}: EP 1 steps by {norms[0]:.4f}, EP 2 by {norms[1]:.4f}; "
        f"unclipped gradients agree within {difference:.0e}"
    )
    assert whole.norm() > 0.2, "the ceiling does not bite"
    assert difference < 1e-5
    assert abs(norms[0] - 0.1) < 1e-4
    if stage == 0:
        assert norms[1] > 0.12, "clipping no longer depends on the layout"
    else:
        assert abs(norms[1] - 0.1) < 1e-4
END
