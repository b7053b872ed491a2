"""MoE layers of others, under our routing or their own."""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

from deepspeed.moe.experts import Experts
from deepspeed.moe.sharded_moe import MOELayer as DeepSpeedMOELayer
from deepspeed.moe.sharded_moe import TopKGate

from dynmoe.routing import RoutingPlan


class SwiGLUExpert(nn.Module):
    """One expert as DeepSpeed's users write it."""

    def __init__(self, w_up_HD: Tensor, w_down_DF: Tensor) -> None:
        super().__init__()
        self.w_up_HD, self.w_down_DF = nn.Parameter(w_up_HD.clone()), nn.Parameter(w_down_DF.clone())

    def forward(self, x: Tensor) -> Tensor:
        gate, up = F.linear(x, self.w_up_HD).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.w_down_DF)


class FixedGate(nn.Module):
    """Gives DeepSpeed's layer a plan of ours, without a drop: K of the busiest token routes, the others unused."""

    def __init__(self, plan: RoutingPlan) -> None:
        super().__init__()
        most = int(plan.experts_per_token_T.max())
        order_TK = plan.routing_map_TE.int().argsort(dim=1, descending=True, stable=True)[:, :most]
        used_TK = plan.routing_map_TE.gather(1, order_TK)
        place_TE = plan.routing_map_TE.cumsum(dim=0) - 1
        self.capacity = int(plan.tokens_per_expert_E.max())
        self.indices_KT = torch.where(used_TK, order_TK, -1).t().int().contiguous()
        self.locations_KT = (place_TE.gather(1, order_TK) * used_TK).t().int().contiguous()
        self.order_TK = order_TK
        self.gates_TE = plan.gates_TE.detach().clone().requires_grad_()
        self.counts_E = plan.tokens_per_expert_E

    def forward(self, *_: object) -> tuple[object, ...]:
        gates_KT = self.gates_TE.gather(1, self.order_TK).t()
        loss = self.gates_TE.new_zeros(())
        experts = self.gates_TE.shape[1]
        return loss, self.capacity, experts, self.indices_KT, self.locations_KT, gates_KT, self.counts_E


def deepspeed_layer(gate: nn.Module, w_up_EHD: Tensor, w_down_EDF: Tensor) -> DeepSpeedMOELayer:
    """DeepSpeed's MoE layer in one process with the given expert weights."""
    num_experts = w_up_EHD.shape[0]
    experts = Experts(SwiGLUExpert(w_up_EHD[0], w_down_EDF[0]), num_experts, "ep_size_1")
    for index, expert in enumerate(experts.deepspeed_experts):
        assert isinstance(expert, SwiGLUExpert)
        with torch.no_grad():
            expert.w_up_HD.copy_(w_up_EHD[index])
            expert.w_down_DF.copy_(w_down_EDF[index])
    return DeepSpeedMOELayer(gate, experts, "ep_size_1", 1, num_experts)


def deepspeed_top2_gate(hidden: int, num_experts: int) -> TopKGate:
    """DeepSpeed's own top-2 gate, without drops and without sampling of the second expert."""
    return TopKGate(hidden, num_experts, k=2, drop_tokens=False, top2_2nd_expert_sampling=False)
