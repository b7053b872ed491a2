"""Top-p routing in Megatron-Core's own MoE layer: torchrun --nproc-per-node 2 examples/megatron_router.py

The router is one argument of the layer spec; the rest is an ordinary Megatron training script."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig

from dynmoe.engines.megatron.router import layer_spec, take_figures
from dynmoe.routers import TopP


def main() -> None:
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    if cuda:
        torch.cuda.set_device(dist.get_node_local_rank())
    device = "cuda" if cuda else "cpu"
    parallel_state.initialize_model_parallel(expert_model_parallel_size=dist.get_world_size())
    model_parallel_cuda_manual_seed(1)
    config = TransformerConfig(
        num_layers=2, hidden_size=64, num_attention_heads=4, num_moe_experts=8, moe_ffn_hidden_size=64,
        expert_model_parallel_size=dist.get_world_size(), moe_token_dispatcher_type="alltoall", add_bias_linear=False,
        gated_linear_unit=True, activation_func=F.silu, normalization="RMSNorm", bias_dropout_fusion=False,
        hidden_dropout=0.0, attention_dropout=0.0, gradient_accumulation_fusion=False, apply_rope_fusion=False,
        finalize_model_grads_func=finalize_model_grads,
    )  # fmt: skip
    spec = layer_spec(TopP(p=0.4, balance_loss=1e-2))
    model = GPTModel(config, spec, vocab_size=256, max_sequence_length=32, position_embedding_type="rope").to(device)
    chunk = DistributedDataParallel(config, DistributedDataParallelConfig(use_distributed_optimizer=True), model)
    optimizer = get_megatron_optimizer(OptimizerConfig(lr=3e-3, use_distributed_optimizer=True), [chunk])
    tokens = torch.arange(8 * 32, device=device).view(8, 32)

    def forward(batches, model):
        losses = model(next(batches), None, None, labels=tokens.roll(-1, dims=1))
        return losses, lambda losses: (losses.mean(), losses.mean().detach())

    for step in range(20):
        chunk.zero_grad_buffer()
        (loss,) = get_forward_backward_func()(
            forward_step_func=forward, data_iterator=iter([tokens]), model=[chunk], num_microbatches=1, seq_length=32,
            micro_batch_size=8, forward_only=False,
        )  # fmt: skip
        optimizer.step()
        used = ", ".join(f"{layer['experts_per_token_mean']:.2f}" for layer in take_figures([chunk]).values())
        if dist.get_rank() == 0:
            print(f"step {step}: loss {loss.item():.3f}, experts per token by layer: {used}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
