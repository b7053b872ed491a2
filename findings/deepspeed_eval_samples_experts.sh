#!/usr/bin/env bash
# A DeepSpeed MoE layer with k=2 is random in eval() too: two evaluations of the same batch differ.
#
# Expected: After module.eval() the layer is a function of its input. Its other noise (noisy_gate_policy) is disabled
# there, like dropout.
# Observed: The second expert of each token is sampled (Gumbel noise on the logits), in training and in evaluation, unless
# the layer was built with top2_2nd_expert_sampling=False. Validation losses, comparisons of checkpoints and generation
# are random without any dropout or sampling. With k=1, the tokens that an expert drops beyond its capacity are also
# chosen at random in eval() (use_rts).
#
# Seen with torch 2.13.0, deepspeed 0.19.8 (8 experts, 1024 tokens; tokens whose output differs between two calls):
#   k=2, eval(), defaults:                          83 %
#   k=2, eval(), top2_2nd_expert_sampling=False:     0 %
#   k=1, eval(), defaults:                          15 %
#   k=1, eval(), use_rts=False:                      0 %
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
x_TD = torch.randn(1024, 32)


@torch.no_grad()
def changing(**options) -> float:
    """The part of all tokens whose output differs between two calls of one layer in eval()."""
    torch.manual_seed(1)
    layer = MoE(32, torch.nn.Linear(32, 32), num_experts=8, **options)
    layer.set_deepspeed_parallelism()
    for expert in layer.deepspeed_moe.experts.deepspeed_experts:
        expert.reset_parameters()  # initially equal
    layer.eval()
    first, second = layer(x_TD)[0], layer(x_TD)[0]
    return ((first - second).abs().amax(dim=1) > 1e-5).float().mean().item()


cases = {
    "k=2, eval(), defaults:": dict(k=2),
    "k=2, eval(), top2_2nd_expert_sampling=False:": dict(k=2, top2_2nd_expert_sampling=False),
    "k=1, eval(), defaults:": dict(k=1),
    "k=1, eval(), use_rts=False:": dict(k=1, use_rts=False),
}
parts = [changing(**options) for options in cases.values()]
for name, part in zip(cases, parts, strict=True):
    print(f"{name:46} {part:4.0%}".replace("%", " %"))
assert parts[0] > 0.5, "the second expert is no longer drawn in eval()"
assert parts[2] > 0.05, "dropped tokens are no longer drawn in eval()"
assert parts[1] == parts[3] == 0
dist.destroy_process_group()
END
