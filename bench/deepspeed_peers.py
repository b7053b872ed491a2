"""DeepSpeed's own training of mixture-of-experts models, set up as its users would."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist
from packaging.version import Version
from torch import Tensor, nn

from dynmoe.config import Config
from dynmoe.data.batches import Batch
from dynmoe.errors import UserError

# Loss and experts per token of a step on a batch with a learning rate.
TrainStep = Callable[[Batch, float], tuple[float, float]]
_TOP_2 = 2.0
_AUTOEP_BREAKS = "5.23"  # the first version with which it does


def own_layers(config: Config, vocab_size: int) -> tuple[TrainStep, list[nn.Module]]:
    """Our decoder with DeepSpeed's MoE layers and top-2 gates, without drops."""
    from bench.peers import DeepSpeedTop2
    from dynmoe.model import Decoder
    from dynmoe.train.optimizer import parameter_groups

    _start(config)
    make_moe = partial(DeepSpeedTop2, ranks=config.parallel.expert)
    module = Decoder(config.model, vocab_size, config.train.seed, make_moe=make_moe)  # type: ignore[arg-type]
    layers = [child for child in module.modules() if isinstance(child, DeepSpeedTop2)]
    step = _training(config, module, parameter_groups(module, config), {}, lambda engine, *ids: (engine(*ids),) * 2)
    return step, list(layers)


def mixtral(config: Config, vocab_size: int) -> tuple[TrainStep, list[nn.Module]]:
    """Transformers' Mixtral with DeepSpeed's AutoEP, which replaces its MoE layers."""
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

    from dynmoe.train.optimizer import parameter_groups

    _start(config)
    module = mixtral_with_our_weights(config, vocab_size)

    def losses(engine: nn.Module, tokens_BS: Tensor, labels_BS: Tensor) -> tuple[Tensor, Tensor]:
        out = engine(input_ids=tokens_BS, labels=labels_BS, shift_labels=labels_BS)
        return out.loss, out.loss - module.router_aux_loss_coef * out.aux_loss

    parallel = {"expert_parallel": {
        "enabled": True, "autoep_size": config.parallel.expert, "preset_model": "mixtral",
    }}  # fmt: skip
    step = _training(config, module, parameter_groups(module, config), parallel, losses)
    return step, [layer for layer in module.modules() if isinstance(layer, AutoEPMoELayer)]


def mixtral_with_our_weights(config: Config, vocab_size: int) -> Any:
    """Transformers' Mixtral of the same sizes, with the weights with which our decoder starts.

    Its balance loss pools the layers, and counts a token once for each of its two experts. The coefficient makes it
    equal to the sum of ours where the layers are loaded alike.
    """
    from transformers import MixtralConfig, MixtralForCausalLM

    from dynmoe.hf.names import STACKED, parts
    from dynmoe.model import Decoder

    model = config.model
    module = MixtralForCausalLM(MixtralConfig(
        vocab_size=vocab_size, hidden_size=model.hidden, intermediate_size=model.moe.expert_hidden,
        num_hidden_layers=model.layers, num_attention_heads=model.heads, num_key_value_heads=model.kv_heads,
        num_local_experts=model.moe.experts, num_experts_per_tok=int(_TOP_2), rms_norm_eps=model.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        tie_word_embeddings=model.tie_embeddings, use_cache=False,
        max_position_embeddings=config.data.sequence_length, output_router_logits=True,
        router_aux_loss_coef=model.router.loss_coefficients().get("balance", 0.0) * model.layers / _TOP_2,
    ))  # fmt: skip
    own = dict(Decoder(model, vocab_size, config.train.seed).named_parameters())
    theirs = dict(module.named_parameters())
    with torch.no_grad():
        for part in parts(model, vocab_size, STACKED):
            pieces = own[part.ours].split(part.rows) if part.rows else [own[part.ours]]
            for name, piece in zip(part.theirs, pieces, strict=True):
                theirs[name].copy_(piece)
    return module


def check_versions() -> None:
    """Raises UserError if AutoEP cannot replace layers of the installed transformers."""
    installed = version("transformers")
    if Version(installed) >= Version(_AUTOEP_BREAKS):
        problem = f"AutoEP of DeepSpeed {version('deepspeed')} fails with transformers {installed}"
        cure = f"pip install 'transformers<{_AUTOEP_BREAKS}', or leave it out"
        raise UserError(f"--methods deepspeed_autoep: {problem} (findings/deepspeed_autoep_transformers.sh); {cure}")


def _start(config: Config) -> None:
    from dynmoe.engines.deepspeed import start_processes

    start_processes()
    torch.manual_seed(config.train.seed)  # replicas draw the same weights


def _training(
    config: Config,
    module: nn.Module,
    groups: list[dict[str, Any]],
    parallel: dict[str, Any],
    losses: Callable[..., tuple[Tensor, Tensor]],
) -> TrainStep:
    """A step of DeepSpeed; ``losses`` returns the loss with auxiliary losses, and the one to report."""
    import deepspeed
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    settings = config.optimizer

    def make_adam(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Called after AutoEP has replaced layers."""
        return torch.optim.AdamW(
            [group for group in split_params_into_different_moe_groups_for_optimizer(groups) if group["params"]],
            lr=settings.lr, betas=(settings.beta1, settings.beta2), eps=settings.eps, fused=True,
        )  # fmt: skip

    elements = 2 * sum(parameter.numel() for parameter in module.parameters())
    engine, *_ = deepspeed.initialize(model=module, model_parameters=groups, optimizer=make_adam, config={
        "train_micro_batch_size_per_gpu": config.train.micro_batch, "gradient_clipping": settings.clip_grad,
        "zero_optimization": {"stage": config.deepspeed.zero_stage, "overlap_comm": False,
                              "reduce_bucket_size": elements, "allgather_bucket_size": elements},
        "bf16": {"enabled": config.train.precision == "bf16"}, "steps_per_print": 10**9, **parallel,
    })  # fmt: skip

    def step(batch: Batch, lr: float) -> tuple[float, float]:
        for group in engine.optimizer.param_groups:
            group["lr"] = lr
        loss, reported = losses(engine, batch.tokens_BS.to(engine.device), batch.labels_BS.to(engine.device))
        engine.backward(loss)
        engine.step()
        mean = reported.detach() / dist.get_world_size()
        dist.all_reduce(mean)
        return mean.item(), _TOP_2

    return step
