#!/usr/bin/env bash
# All experts of a DeepSpeed MoE layer start with the same weights; with k=2 the router then has no gradient.
#
# Expected: deepspeed.moe.layer.MoE(hidden_size, expert, num_experts=8) creates eight experts like `expert`, each with its
# own random weights.
# Observed: It copies the weights too. With k=1 the router still has a gradient, because the output is scaled by a
# probability. With k=2 the gates sum to 1 and both experts give the same output. Whatever the router selects, the output
# is that of one dense expert, and the router's gradient is zero (except for rounding) until noise has made the experts
# differ. If each expert has its own random weights, the router has a gradient from the first step.
#
# Seen with torch 2.13.0, deepspeed 0.19.8 (8 experts; gradient of the router's weights for a squared error):
#   different experts among 8: 1
#   k=1, as made:              1.1e-02
#   k=2, as made:              4.6e-09
#   k=2, drawn one by one:     2.5e-02
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install -qq torch==2.13.0 setuptools
venv/bin/python -m pip install -qq deepspeed==0.19.8

export DS_ACCELERATOR=cpu
venv/bin/python - <<'END'
import logging
import tempfile

logging.disable(logging.WARNING)
import deepspeed
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # needs no compiler
dist.init_process_group("gloo", init_method=f"file://{tempfile.mkdtemp()}/store", rank=0, world_size=1)
deepspeed.init_distributed("gloo", verbose=False)
torch.manual_seed(0)
x_TD, target_TD = torch.randn(64, 32), torch.randn(64, 32)


def layer(k: int) -> MoE:
    torch.manual_seed(1)
    expert = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 32))
    made = MoE(32, expert, num_experts=8, k=k, drop_tokens=False)
    made.set_deepspeed_parallelism()
    return made


def router_gradient(made: MoE) -> float:
    torch.nn.functional.mse_loss(made(x_TD)[0], target_TD).backward()
    return made.deepspeed_moe.gate.wg.weight.grad.norm().item()


one, two, drawn = layer(1), layer(2), layer(2)
experts = two.deepspeed_moe.experts.deepspeed_experts
different = len({expert[0].weight.detach().numpy().tobytes() for expert in experts})
for expert in drawn.deepspeed_moe.experts.deepspeed_experts:
    expert[0].reset_parameters()
    expert[2].reset_parameters()
gradients = router_gradient(one), router_gradient(two), router_gradient(drawn)
print(f"different experts among 8: {different}")
for name, gradient in zip(("k=1, as made:", "k=2, as made:", "k=2, drawn one by one:"), gradients, strict=True):
    print(f"{name:26} {gradient:.1e}")
assert different == 1, "experts start with different weights now"
assert gradients[1] < 1e-4 * min(gradients[0], gradients[2]), "the router learns with k=2 now"
dist.destroy_process_group()
END
