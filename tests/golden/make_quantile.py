"""Makes ``megatron_quantile.safetensors``: the biases of Megatron-Core's quantile balancing for given scores.

    python tests/golden/make_quantile.py FILE

Needs Megatron-Core 0.19.2, and nothing of this project. Runs Megatron's own update (``qb_dual_update`` for each
micro-batch, ``_update_router_qb_beta`` for each step) on softmax and sigmoid scores of synthetic logits.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace

import torch
import torch.distributed as dist
from megatron.core.distributed.finalize_model_grads import _update_router_qb_beta
from megatron.core.transformer.moe.moe_utils import qb_dual_update
from safetensors.torch import save_file

STEPS = 3
TOKENS = 512
CASES = {"softmax": (16, 2, 0.0), "sigmoid": (8, 3, 0.0), "average": (16, 2, 0.75)}  # experts, k, memory


class MegatronState(torch.nn.Module):
    """The buffers of Megatron's router that its update reads."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.register_buffer("qb_beta", torch.zeros(num_experts))
        self.register_buffer("qb_beta_accum", torch.zeros(num_experts))
        self.register_buffer("qb_beta_count", torch.zeros((), dtype=torch.long))


def main(file: str) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, (num_experts, k, memory) in CASES.items():
        state = MegatronState(num_experts).train()
        config = SimpleNamespace(moe_router_quantile_balancing_ema=memory)
        skew_E = 1.5 * torch.randn(num_experts, generator=generator)
        for step in range(STEPS):
            logits_TE = skew_E + torch.randn(TOKENS, num_experts, generator=generator)
            scores_TE = logits_TE.sigmoid() if name == "sigmoid" else logits_TE.softmax(dim=1)
            indices_TK, beta_E = qb_dual_update(scores_TE, k, state.qb_beta)
            state.qb_beta_accum.copy_(beta_E)
            state.qb_beta_count.fill_(1)
            found[f"{name}.{step}.scores"] = scores_TE
            found[f"{name}.{step}.indices"] = indices_TK.sort(dim=1).values.int()
            _update_router_qb_beta([state], config)
            # Megatron subtracts its bias from the scores.
            found[f"{name}.{step}.bias"] = -state.qb_beta
    save_file({key: value.contiguous() for key, value in found.items()}, file)


if __name__ == "__main__":
    main(sys.argv[1])
