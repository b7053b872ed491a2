"""MoE layers of other projects, with our routing or their own."""

from __future__ import annotations

import gc
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

from deepspeed.moe.ep_experts import GroupedExperts
from deepspeed.moe.experts import Experts
from deepspeed.moe.layer import MoE
from deepspeed.moe.sharded_moe import MOELayer as DeepSpeedMOELayer
from deepspeed.moe.sharded_moe import TopKGate

from bench.cases import Method
from dynmoe.config import ModelConfig
from dynmoe.moe import MoEContext
from dynmoe.moe.experts import down_std
from dynmoe.moe.initialization import named_normal
from dynmoe.ops import attach_loss
from dynmoe.routing import RoutingPlan


class SwiGLUExpert(nn.Module):
    """One expert as written by DeepSpeed's users."""

    def __init__(self, w_up_HD: Tensor, w_down_DF: Tensor) -> None:
        super().__init__()
        self.w_up_HD = nn.Parameter(w_up_HD.clone())
        self.w_down_DF = nn.Parameter(w_down_DF.clone())

    def forward(self, x: Tensor) -> Tensor:
        gate, up = F.linear(x, self.w_up_HD).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.w_down_DF)


class FixedGate(nn.Module):
    """Gives DeepSpeed's layer our plan without drops: every token gets the maximum K routes, some of them unused."""

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
        self.gates_TE = nn.Parameter(plan.gates_TE.detach().clone())
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


class DeepSpeedTop2(nn.Module):
    """DeepSpeed's whole MoE layer for our decoder, with our initial experts; its loss is attached to the output.

    Args:
        model: our model configuration.
        layer: index of the decoder layer.
        seed: seed of the experts; the gate uses torch's generator, which must be seeded alike on all replicas.
        context: context of our own layers; unused.
        ranks: number of ranks that share the experts.
    """

    def __init__(self, model: ModelConfig, layer: int, seed: int, context: MoEContext, *, ranks: int) -> None:
        super().__init__()
        moe, std = model.moe, model.init_std
        self._coefficient = model.router.loss_coefficients().get("balance", 0.0)
        expert: nn.Module = SwiGLUExpert(
            torch.empty(2 * moe.expert_hidden, model.hidden), torch.empty(model.hidden, moe.expert_hidden)
        )
        self.moe = MoE(
            model.hidden, expert, moe.experts, ep_size=ranks, k=2, drop_tokens=False, top2_2nd_expert_sampling=False
        )
        # DeepSpeed copies the given expert; ours start as independent draws, so these do too.
        own = self.moe.deepspeed_moe.experts.deepspeed_experts
        first = dist.get_rank() % ranks * len(own)
        with torch.no_grad():
            for number, expert in enumerate(own, start=first):
                for name, parameter in expert.named_parameters():
                    scale = std if name == "w_up_HD" else down_std(model)
                    label = f"layers.{layer}.moe.experts.{name[:-3]}.{number}"
                    parameter.copy_(named_normal(tuple(parameter.shape), scale, seed, label))
            self.moe.deepspeed_moe.gate.wg.weight.normal_(0.0, std)

    def forward(self, x: Tensor, importance: Tensor | None = None) -> Tensor:
        y, loss, _ = self.moe(x)
        return attach_loss(y, loss * self._coefficient, 1.0)


class AutoEPLayer(nn.Module):
    """The grouped experts of DeepSpeed's AutoEP between a gather of rows and a weighted sum of them."""

    def __init__(self, plan: RoutingPlan, w_up_EHD: Tensor, w_down_EDF: Tensor) -> None:
        super().__init__()
        num_experts, hidden, width = w_down_EDF.shape
        self.experts = GroupedExperts(hidden, width, num_experts).to(w_up_EHD)
        with torch.no_grad():
            self.experts.w1.copy_(w_up_EHD[:, :width])
            self.experts.w3.copy_(w_up_EHD[:, width:])
            self.experts.w2.copy_(w_down_EDF)
        self.map_TE = plan.routing_map_TE
        self.gates_TE = nn.Parameter(plan.gates_TE.detach().clone())

    def forward(self, x_TD: Tensor) -> Tensor:
        expert_N, token_N = self.map_TE.t().nonzero(as_tuple=True)
        rows_ND = self.experts(x_TD[token_N], self.map_TE.sum(dim=0))
        gated_ND = rows_ND * self.gates_TE[token_N, expert_N].to(x_TD.dtype).unsqueeze(1)
        return torch.zeros_like(x_TD).index_add(0, token_N, gated_ND)


class MegatronRouter(nn.Module):
    """Gives Megatron's layer our plan."""

    def __init__(self, plan: RoutingPlan) -> None:
        super().__init__()
        self.map_TE = plan.routing_map_TE
        self.gates_TE = nn.Parameter(plan.gates_TE.detach().clone())

    def forward(self, *_: object) -> tuple[Tensor, Tensor]:
        return self.gates_TE, self.map_TE


def megatron_layer(plan: RoutingPlan, w_up_EHD: Tensor, w_down_EDF: Tensor) -> nn.Module:
    """Megatron-Core's MoELayer in one process with our routing, all-to-all dispatcher and sequential experts."""
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.moe.moe_layer import MoELayer

    import dynmoe.engines.megatron  # noqa: F401  lets its modules run on a CPU
    from dynmoe.config.parallel import ParallelConfig
    from dynmoe.engines.megatron.groups import make_groups, start_processes

    start_processes()
    make_groups(ParallelConfig(), seed=0)
    num_experts, hidden, width = w_down_EDF.shape
    config = TransformerConfig(
        num_layers=1, hidden_size=hidden, num_attention_heads=1, num_moe_experts=num_experts, moe_ffn_hidden_size=width,
        add_bias_linear=False, gated_linear_unit=True, activation_func=F.silu, bias_activation_fusion=False,
        moe_token_dispatcher_type="alltoall", use_cpu_initialization=True, params_dtype=w_up_EHD.dtype,
        bf16=w_up_EHD.dtype == torch.bfloat16, moe_router_dtype="fp32", moe_aux_loss_coeff=0.0,
    )  # fmt: skip
    spec = get_moe_module_spec(use_te=False, num_experts=num_experts, moe_grouped_gemm=False)
    layer = MoELayer(config, spec.submodules, layer_number=1)
    layer.router = MegatronRouter(plan)
    with torch.no_grad():
        for expert, w_up_HD, w_down_DF in zip(layer.experts.local_experts, w_up_EHD, w_down_EDF, strict=True):
            expert.linear_fc1.weight.copy_(w_up_HD)
            expert.linear_fc2.weight.copy_(w_down_DF)
    return layer.to(w_up_EHD.device)


def same_routing_peers(plan: RoutingPlan, w_up_EHD: Tensor, w_down_EDF: Tensor) -> list[Method]:
    """Layers of other projects that accept a plan."""
    gc.collect()  # peers have reference cycles: gigabytes of the previous case would stay allocated
    padded = deepspeed_layer(FixedGate(plan), w_up_EHD, w_down_EDF).to(w_up_EHD.device)
    auto_ep = AutoEPLayer(plan, w_up_EHD, w_down_EDF).to(w_up_EHD.device)
    megatron = megatron_layer(plan, w_up_EHD, w_down_EDF)
    return [
        Method("deepspeed_moe", padded, lambda x: padded(x, None)),
        Method("deepspeed_autoep", auto_ep, auto_ep),
        Method("megatron_moe", megatron, lambda x: megatron(x.unsqueeze(1))[0].squeeze(1)),
    ]


def own_routing_peer(hidden: int, w_up_EHD: Tensor, w_down_EDF: Tensor) -> Method:
    """DeepSpeed's layer with its own top-2 gate: the same FLOPs at K = 2, routed evenly by chance."""
    gate = deepspeed_top2_gate(hidden, len(w_up_EHD))
    layer = deepspeed_layer(gate, w_up_EHD, w_down_EDF).to(w_up_EHD.device, w_up_EHD.dtype)
    return Method("deepspeed_top2", layer, lambda x: layer(x, None), same_routing=False)
