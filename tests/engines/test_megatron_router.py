"""Our routers in Megatron's own MoE layer, dispatchers and training loop."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from dynmoe.errors import UserError
from dynmoe.moe.initialization import named_normal
from dynmoe.routers import ExpertThreshold, IdentityExperts, NullExperts, ReLU, Sigmoid, TopAny, TopK, TopP
from harness.processes import CPU, ROOT

KINDS = {
    "top_k": TopK(k=2, z_loss=1e-2),
    "top_p": TopP(p=0.5, balance_loss=1e-1),
    "top_any": TopAny(variant="improved"),
    "sigmoid": Sigmoid(balance_loss=1e-1),
    "null_experts": NullExperts(k=3, num_null=2),
}
# Fewer and more routes than moe_router_topk = 2 allocates.
EVERY_TOKEN = {"one": TopK(k=1), "all": TopK(k=4)}


def transformer(**fields):
    from megatron.core.transformer import TransformerConfig

    common = {
        "num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "num_moe_experts": 4, "moe_ffn_hidden_size": 32,
        "add_bias_linear": False, "gated_linear_unit": True, "activation_func": torch.nn.functional.silu,
        "normalization": "RMSNorm", "hidden_dropout": 0.0, "attention_dropout": 0.0, "bias_dropout_fusion": False,
        "gradient_accumulation_fusion": False, "apply_rope_fusion": False, "moe_token_dispatcher_type": "alltoall",
        "expert_tensor_parallel_size": 1, "use_cpu_initialization": True,
    }  # fmt: skip
    return TransformerConfig(**(common | fields))


def draw_weight(name: str, parameter: torch.nn.Parameter, tensor: int, expert: int) -> None:
    """Initializes the same weights in every layout; router weights are large, so that the number of experts varies."""
    if "router" in name:
        parameter.mul_(30.0 if parameter.dim() > 1 else 1.0)
    elif found := re.search(r"(.*local_experts)\.(\d+)\.(.*)", name):
        number = int(found[2]) + (4 // expert * dist.get_rank() if expert > 1 else 0)
        parameter.copy_(named_normal(parameter.shape, 0.1, 0, f"{found[1]}.{number}.{found[3]}"))
    elif parameter.dim() > 1:
        dim = parameter.partition_dim if tensor > 1 else 0
        shape = [size * tensor if place == dim else size for place, size in enumerate(parameter.shape)]
        part = dist.get_rank() % tensor
        parameter.copy_(named_normal(tuple(shape), 0.1, 0, name).chunk(tensor, dim)[part])


def train_stock_layers(
    kind: str, tensor: int, expert: int, dispatcher: str = "alltoall", recompute: bool = False
) -> dict:
    """Trains three steps of a GPTModel with Megatron's MoELayer and optimizer, on the same tokens in every layout."""
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.models.gpt import GPTModel
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    from dynmoe.config.parallel import ParallelConfig
    from dynmoe.engines.megatron.groups import make_groups
    from dynmoe.engines.megatron.model import RMSNorm
    from dynmoe.engines.megatron.router import layer_spec, take_figures

    make_groups(ParallelConfig(tensor=tensor, expert=expert), seed=1)
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    config = transformer(
        tensor_model_parallel_size=tensor, sequence_parallel=tensor > 1, expert_model_parallel_size=expert,
        moe_token_dispatcher_type=dispatcher, moe_flex_dispatcher_backend="hybridep", **(full if recompute else {}),
    )  # fmt: skip
    spec = layer_spec({**KINDS, **EVERY_TOKEN}[kind], seed=3)
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = RMSNorm  # not torch's: sequence parallelism
    block = TransformerBlockSubmodules(layer_specs=[spec] * config.num_layers, layer_norm=RMSNorm)
    model = GPTModel(config, block, 64, 16, position_embedding_type="rope")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draw_weight(name, parameter, tensor, expert)
    chunk = DistributedDataParallel(config, DistributedDataParallelConfig(use_distributed_optimizer=True), model)
    config.finalize_model_grads_func = finalize_model_grads
    optimizer = get_megatron_optimizer(
        OptimizerConfig(lr=1e-2, clip_grad=0.0, use_distributed_optimizer=True), [chunk], use_gloo_process_groups=False
    )
    tokens = torch.randint(64, (4, 17), generator=torch.Generator().manual_seed(0))
    mine = tokens.chunk(dist.get_world_size() // tensor)[dist.get_rank() // tensor]

    def forward(batches, model):
        tokens = next(batches)
        losses = model(tokens[:, :-1].contiguous(), None, None, labels=tokens[:, 1:].contiguous())
        return losses, lambda losses: (losses.mean(), losses.mean().detach())

    losses = []
    norms = []
    figures = []
    for _ in range(3):
        chunk.zero_grad_buffer()
        optimizer.zero_grad()
        made = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iter([mine]), model=[chunk], num_microbatches=1, seq_length=16, micro_batch_size=len(mine),
            forward_only=False,
        )  # fmt: skip
        _, norm, _ = optimizer.step()
        loss = made[0].clone()
        dist.all_reduce(loss)
        losses.append(loss.item() / dist.get_world_size())
        norms.append(norm)
        figures.append(take_figures([chunk]))
    return {"losses": losses, "norms": norms, "figures": figures}


@pytest.mark.parametrize(("tensor", "expert"), [(1, 1), (1, 2), (2, 2)], ids=["DP 2", "EP 2", "TP 2 x EP 2"])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_two_ranks_train_like_one(one_rank, two_ranks, kind, tensor, expert):
    """Compares losses, gradient norms with auxiliary losses, and metrics over all ranks."""
    (alone,) = one_rank.run(train_stock_layers, kind, 1, 1)
    spread = two_ranks.run(train_stock_layers, kind, tensor, expert)[0]
    assert spread["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    if tensor == 1:  # Megatron's norm lacks the experts of the other tensor-parallel ranks
        assert spread["norms"] == pytest.approx(alone["norms"], rel=1e-4)
    for ours, whole in zip(spread["figures"], alone["figures"], strict=True):
        assert sorted(ours) == [0, 1]
        for layer, own in ours.items():
            assert own["experts_per_token_mean"] == pytest.approx(whole[layer]["experts_per_token_mean"], abs=1e-6)
            assert own["auxiliary_loss"] == pytest.approx(whole[layer]["auxiliary_loss"], rel=1e-4)


def test_both_dispatchers_and_recomputation_support_a_variable_number_of_experts(one_rank):
    (expected,) = one_rank.run(train_stock_layers, "top_p", 1, 1)
    means = [own["experts_per_token_mean"] for own in expected["figures"][0].values()]
    assert all(1.0 < mean < 4.0 and mean % 1 for mean in means), means
    for dispatcher, recompute in (("allgather", False), ("alltoall", True)):
        (other,) = one_rank.run(train_stock_layers, "top_p", 1, 1, dispatcher, recompute)
        assert other["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert other["norms"] == pytest.approx(expected["norms"], rel=1e-5)
        assert other["figures"] == expected["figures"] or not recompute, "a recomputed pass was counted"


def train_over_hybrid_ep(kind: str, tensor: int) -> dict:
    from tests.engines import hybrid_ep

    with hybrid_ep.on_the_cpu():
        return train_stock_layers(kind, tensor, 2, "flex")


@pytest.mark.parametrize("expert", [1, 2])
@pytest.mark.parametrize("kind", sorted(EVERY_TOKEN))
def test_the_all_to_all_dispatcher_neither_loses_nor_adds_rows(one_rank, two_ranks, kind, expert):
    """The reference is the all-gather dispatcher; the stock all-to-all one allocates moe_router_topk rows per token."""
    pool = two_ranks if expert == 2 else one_rank
    gathered = pool.run(train_stock_layers, kind, 1, expert, "allgather")[0]
    exchanged = pool.run(train_stock_layers, kind, 1, expert, "alltoall")[0]
    assert exchanged["losses"] == pytest.approx(gathered["losses"], rel=1e-6)
    assert exchanged["norms"] == pytest.approx(gathered["norms"], rel=1e-5)
    means = [own["experts_per_token_mean"] for own in exchanged["figures"][0].values()]
    assert means == [EVERY_TOKEN[kind].k] * 2


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("kind", ["top_p", "one", "all"])
def test_hybrid_ep_supports_a_variable_number_of_experts(two_ranks, kind, tensor):
    expected = two_ranks.run(train_stock_layers, kind, tensor, 2)[0]
    result = two_ranks.run(train_over_hybrid_ep, kind, tensor)[0]
    assert result["losses"] == pytest.approx(expected["losses"], rel=1e-6)
    assert result["norms"] == pytest.approx(expected["norms"], rel=1e-5)


def dispatch_within_budget(room: float) -> dict:
    """Dispatches and combines with HybridEP's fixed number of rows, through identity experts."""
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
    from megatron.core.transformer.moe.token_dispatcher import MoEFlexTokenDispatcher

    from dynmoe.config.parallel import ParallelConfig
    from dynmoe.engines.megatron.groups import make_groups
    from dynmoe.engines.megatron.router import DynamicRouter
    from tests.engines import hybrid_ep

    make_groups(ParallelConfig(expert=2), seed=1)
    config = transformer(
        moe_token_dispatcher_type="flex", moe_flex_dispatcher_backend="hybridep", moe_router_topk=2,
        expert_model_parallel_size=2,
    )  # fmt: skip
    # Set afterwards: the constructor would require Transformer Engine's fused experts, with a multiple of 256 rows.
    config.moe_expert_rank_capacity_factor = room
    config.use_transformer_engine_op_fuser = True
    generator = torch.Generator().manual_seed(dist.get_rank())
    with hybrid_ep.on_the_cpu():
        router = DynamicRouter(config, settings=TopP(p=0.5), seed=3)
        with torch.no_grad():
            router.router.weight_ED.mul_(30.0)
        experts = range(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
        dispatcher = MoEFlexTokenDispatcher(2, list(experts), config, get_default_pg_collection())
        x_TD = torch.randn(256, 32, generator=generator)
        gates_TE, map_TE = router(x_TD)
        rows, gates = dispatcher.token_dispatch(*dispatcher.dispatch_preprocess(x_TD, map_TE, gates_TE))
        rows, _, _ = dispatcher.dispatch_postprocess(rows, gates)
        y_TD = dispatcher.combine_postprocess(dispatcher.token_combine(dispatcher.combine_preprocess(rows)))
        over = bool(dispatcher.check_over_budget())
    complete = torch.allclose(y_TD, x_TD * map_TE.sum(1, keepdim=True), atol=1e-6)
    return {"rows": len(rows), "over": over, "complete": complete}


@pytest.mark.parametrize("room", [2.0, 0.5])
def test_exceeding_a_fixed_number_of_rows_is_reported(two_ranks, room):
    from megatron.core.transformer import TransformerConfig

    if not hasattr(TransformerConfig, "moe_expert_rank_capacity_factor"):
        pytest.skip("this Megatron-Core has no moe_expert_rank_capacity_factor (0.18 has)")
    results = two_ranks.run(dispatch_within_budget, room)
    assert [result["rows"] for result in results] == [256 * 2 * room] * 2
    assert any(result["over"] for result in results) is (room < 1)
    assert all(result["complete"] for result in results) is (room > 1)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"moe_permute_fusion": True}, "moe_permute_fusion=True"),
        ({"moe_token_dispatcher_type": "flex"}, "moe_flex_dispatcher_backend='deepep'.*use 'hybridep'"),
        ({"moe_expert_capacity_factor": 1.0}, "moe_expert_capacity_factor=1.0"),
        ({"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True}, "moe_expert_capacity_factor"),
        ({"moe_aux_loss_coeff": 0.01}, "moe_aux_loss_coeff=0.01.*use balance_loss of the router"),
        ({"moe_z_loss_coeff": 0.01}, "moe_z_loss_coeff=0.01.*use z_loss of the router"),
        ({"moe_router_enable_expert_bias": True, "moe_router_score_function": "sigmoid"}, "expert_bias=True"),
        ({"moe_input_jitter_eps": 0.1}, "moe_input_jitter_eps=0.1"),
        ({"moe_enable_routing_replay": True}, "moe_enable_routing_replay=True"),
        ({"moe_router_load_balancing_type": "quantile_balancing"}, "load_balancing_type='quantile_balancing'"),
        ({"moe_router_load_balancing_type": ["aux_loss", "sinkhorn"]}, "load_balancing_type=.*sinkhorn"),
        ({"transformer_impl": "inference_optimized"}, "transformer_impl='inference_optimized'"),
        ({"cuda_graph_impl": "local", "cuda_graph_scope": [], "cuda_graph_modules": []}, "cuda_graph_impl='local'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_options_that_assume_a_fixed_k_are_refused_by_name(fields, named):
    from dynmoe.engines.megatron.stock_config import check_config

    config = transformer()
    check_config(config, KINDS["top_p"])
    for name, value in fields.items():  # set afterwards: the constructor requires GPU packages for some of them
        setattr(config, name, value)
    with pytest.raises(UserError, match=named):
        check_config(config, KINDS["top_p"])


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (ReLU(), "kind='relu'.*engine=megatron"),
        (ExpertThreshold(), "kind='expert_threshold'"),
        (TopP(budgets=[1.0, 2.0]), r"budgets=\[1.0, 2.0\]: are drawn between steps"),
        (IdentityExperts(), "kind='identity_experts': computes part of the output itself"),
        (TopP(balance_scope="sequence"), "balance_scope='sequence'"),
    ],
)
def test_routers_that_a_stock_loop_cannot_run_are_refused(settings, named):
    from dynmoe.engines.megatron.stock_config import check_config

    with pytest.raises(UserError, match=named):
        check_config(transformer(), settings)


def test_a_spec_without_an_moe_layer_is_refused():
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from dynmoe.engines.megatron.router import top_p_spec, with_router

    with pytest.raises(UserError, match="build it with num_experts"):
        with_router(get_gpt_layer_local_spec(normalization="RMSNorm"), KINDS["top_p"])
    mlp = top_p_spec.submodules.mlp  # from 0.18 on a functools.partial
    parts = mlp.keywords["submodules"] if isinstance(mlp, functools.partial) else mlp.submodules
    assert parts.router.keywords["settings"].kind == "top_p"


def test_a_router_fits_the_stack_of_a_hybrid_model():
    hybrid = pytest.importorskip(
        "megatron.core.models.hybrid.hybrid_layer_specs", reason="this Megatron-Core has no HybridModel (0.18 has)"
    )
    from dynmoe.engines.megatron.router import DynamicRouter, with_router

    stock = hybrid.hybrid_stack_spec.submodules
    routed = with_router(hybrid.hybrid_stack_spec, KINDS["top_p"]).submodules
    assert routed.moe_layer.submodules.mlp.keywords["submodules"].router.func is DynamicRouter
    assert stock.moe_layer.submodules.mlp.keywords["submodules"].router is not DynamicRouter
    assert routed.attention_layer is stock.attention_layer


@pytest.mark.slow
def test_the_example_learns_with_a_dynamic_number_of_experts():
    path = ROOT / "examples" / "megatron_router.py"
    assert len(path.read_text().splitlines()) < 60
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d",
         "--rdzv-endpoint", "127.0.0.1:0", str(path)],
        capture_output=True, text=True, check=False, timeout=180, cwd=ROOT,
        env=os.environ | CPU | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    losses = [float(value) for value in re.findall(r"loss ([\d.]+)", done.stdout)]
    experts = [float(value) for value in re.findall(r"layer: ([\d.]+)", done.stdout)]
    assert len(losses) == len(experts) == 20
    assert losses[-1] < losses[0] - 1.0
    assert any(value % 1 for value in experts)
