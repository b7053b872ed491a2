"""Megatron's distributed optimizer with our parameter groups, and access to its state by parameter."""

from __future__ import annotations

from collections.abc import Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from types import MethodType
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer, DistributedOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from torch import Tensor, nn

from dynmoe.config import Config
from dynmoe.config.sections import OptimizerConfig as OptimizerSettings
from dynmoe.engines.state_names import MASTER, MOMENTS, MOMENTS_OF_MUON
from dynmoe.train.optimizer import make_optimizer as make_torch_optimizer
from dynmoe.train.optimizer import parameter_groups


def make_optimizer(config: Config, chunks: Sequence[DistributedDataParallel]) -> ChainedOptimizer:
    """Builds AdamW, or Muon with AdamW, over all model chunks.

    Its state is sharded over the ranks that replicate the parameters. The moments exist from the start, as zeros.
    """
    settings = config.optimizer
    bf16 = config.train.precision == "bf16"
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam", lr=settings.lr, min_lr=0.0, weight_decay=settings.weight_decay,
            adam_beta1=settings.beta1, adam_beta2=settings.beta2, adam_eps=settings.eps, clip_grad=settings.clip_grad,
            bf16=bf16, params_dtype=torch.bfloat16 if bf16 else torch.float32, use_distributed_optimizer=True,
        ),
        list(chunks),
        config_overrides=_config_overrides(config, chunks),
        use_gloo_process_groups=True,
    )  # fmt: skip
    for part in optimizer.chained_optimizers:
        for group in part.param_groups:
            group["weight_decay"] = settings.weight_decay * group["wd_mult"]
            group.setdefault("muon", False)
        if settings.kind == "muon" and not part.is_stub_optimizer:
            part.optimizer = _with_muon(part.param_groups, settings)
        if isinstance(part.optimizer, torch.optim.AdamW):
            _prepare_torch_adam(part)
        else:
            part.init_state_fn(part.optimizer, part.config)
    return optimizer


def _with_muon(groups: list[dict[str, Any]], settings: OptimizerSettings) -> torch.optim.AdamW:
    """Muon and AdamW over the groups of one of Megatron's optimizers."""
    optimizer = make_torch_optimizer([group | {"params": []} for group in groups], settings)
    for own, group in zip(optimizer.param_groups, groups, strict=True):
        own["params"] = group["params"]  # shards of parameters, which a new optimizer would refuse: they are no leaves
    return optimizer


def _config_overrides(config: Config, chunks: Sequence[DistributedDataParallel]) -> dict[ParamKey, dict[str, float]]:
    """Options of our parameter groups that differ from the default: no weight decay, another learning rate."""
    groups = [group for chunk in chunks for group in parameter_groups(chunk, config)]
    names = {id(parameter): group["name"] for group in groups for parameter in group["params"]}
    factor = config.model.router.lr_factor
    learning_rate = {} if factor == 1 else {"lr_mult": factor}
    # Identical on every rank, whichever parameters it holds: Megatron compares them.
    values: dict[str, dict[str, float]] = {
        # Megatron tells groups apart by this field, which it does not use itself, but not by ours.
        "muon": {"muon": True, "is_decoupled_lr": True},
        "no_decay": {"wd_mult": 0.0},
        "router": learning_rate,
        "router_no_decay": {"wd_mult": 0.0, **learning_rate},
    }

    def key(name: str) -> ParamKey:
        return ParamKey(predicate=ParamPredicate(name, lambda parameter: names.get(id(parameter)) == name))

    return {key(name): fields for name, fields in values.items() if fields}


def _prepare_torch_adam(part: DistributedOptimizer) -> None:
    """Adapts torch's AdamW, the fallback without Apex or Transformer Engine, to Megatron's checkpoints.

    torch keeps a step tensor per parameter, which Megatron does not expect among the moments. Megatron also reads the
    step on a rank that holds no shard of any expert.
    """
    for group in part.optimizer.param_groups:
        group["fused"] = True
        for tensor in group["params"]:
            part.optimizer.state[tensor] = {
                "step": torch.zeros((), dtype=torch.float32, device=tensor.device),
                **{name: torch.zeros_like(tensor) for name in (MOMENTS_OF_MUON if group["muon"] else MOMENTS)},
            }
    if not part.optimizer.state:
        part.optimizer.state["nothing"] = {"step": torch.zeros(())}
    part._get_main_param_and_optimizer_states = MethodType(_get_main_param_and_moments, part)
    part._set_main_param_and_optimizer_states = MethodType(_set_main_param_and_moments, part)


def count_steps_of_nothing(optimizer: ChainedOptimizer, step: int) -> None:
    """Sets the step of optimizers that hold no parameter here, which torch does not count.

    A checkpoint has the step of rank 0 for all ranks, and rank 0 may be of a pipeline stage without experts.
    """
    for part in optimizer.chained_optimizers:
        if not isinstance(part.optimizer, torch.optim.AdamW) or any(group["params"] for group in part.param_groups):
            continue
        for state in part.optimizer.state.values():
            state["step"].fill_(step)


def _get_main_param_and_moments(part: DistributedOptimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """This rank's flat shards of a parameter's fp32 master and moments.

    Megatron's checkpoints always have both moments; the second one of Muon is zero.
    """
    group, order = part.model_param_group_index_map[parameter]
    main = part.optimizer.param_groups[group]["params"][order]
    nothing = main.new_zeros(()).expand_as(main)
    return {"param": main.detach(), **{name: part.optimizer.state[main].get(name, nothing) for name in MOMENTS}}


@torch.no_grad()
def _set_main_param_and_moments(part: DistributedOptimizer, parameter: nn.Parameter, values: dict[str, Tensor]) -> None:
    for name, held in _get_main_param_and_moments(part, parameter).items():
        if held.stride() != (0,):  # not Muon's second moment
            held.copy_(values[name])


class OptimizerState:
    """Access to this rank's shards of fp32 masters and moments, by parameter.

    Args:
        optimizer: of the engine.
        muon: parameters that Muon updates, by ``id``.
    """

    def __init__(self, optimizer: ChainedOptimizer, muon: Set[int] = frozenset()) -> None:
        self._muon = muon
        self._parts = [part for part in optimizer.chained_optimizers if not part.is_stub_optimizer]

    def set_step(self, step: int) -> None:
        """Sets the number of optimizer steps taken."""
        for part in self._parts:
            if isinstance(part.optimizer, torch.optim.AdamW):
                for state in part.optimizer.state.values():
                    # A tensor each: Megatron lets all parameters share one, which each of them would increment.
                    state["step"] = torch.full_like(state["step"], step)
            elif step > 0:  # fused optimizers count per group, and only from the first step on
                for group in part.optimizer.param_groups:
                    group["step"] = step

    def moments(self, parameter: nn.Parameter) -> tuple[str, ...]:
        """Names of the moments of a parameter."""
        return MOMENTS_OF_MUON if id(parameter) in self._muon else MOMENTS

    def shard(self, parameter: nn.Parameter) -> tuple[dict[str, Tensor], int]:
        """This rank's flat shards of master and moments, by name, and their offset in the flattened parameter.

        Empty where this rank holds no shard of the parameter.
        """
        for part in self._parts:
            if parameter in part.model_param_group_index_map:
                start = part._get_model_param_range_map(parameter)["param"].start
                held = part._get_main_param_and_optimizer_states(parameter)
                return {MASTER: held["param"], **{name: held[name] for name in self.moments(parameter)}}, start
        return {}, 0

    @torch.no_grad()
    def set(self, parameter: nn.Parameter, values: dict[str, Tensor]) -> None:
        """Sets the parameter and this rank's shards of master and moments from whole tensors."""
        parameter.copy_(values[MASTER])
        shards, start = self.shard(parameter)
        for part, held in shards.items():
            held.copy_(values[part].flatten()[start : start + held.numel()])

    def whole(self, module: nn.Module) -> AbstractContextManager[None]:
        """See :class:`dynmoe.moe.adaptation.ParameterReset`; parameters always are whole, or this rank's shards."""
        return nullcontext()

    @torch.no_grad()
    def reset_slice(self, parameter: nn.Parameter, index: tuple[int | slice, ...], fresh: Tensor | None) -> None:
        """See :class:`dynmoe.moe.adaptation.ParameterReset`; needs no communication, as all ranks call it alike."""
        renewed = torch.zeros_like(parameter, dtype=torch.bool)
        renewed[index] = True
        values = torch.zeros_like(parameter, dtype=torch.float32)
        if fresh is not None:
            values[index] = fresh
            parameter[index] = fresh.to(parameter.dtype)
        shards, start = self.shard(parameter)
        for part, held in shards.items():
            if part == MASTER and fresh is None:
                continue
            shard = slice(start, start + held.numel())
            new = values.flatten()[shard] if part == MASTER else torch.zeros_like(held)
            held.copy_(torch.where(renewed.flatten()[shard], new, held))


def clip_gradients(optimizer: ChainedOptimizer, max_norm: float, total_norm: float) -> None:
    """Scales the gradients, of norm ``total_norm``, to a norm of at most ``max_norm``; 0 disables clipping."""
    for part in optimizer.chained_optimizers:
        if max_norm > 0 and not part.is_stub_optimizer and part.get_parameters():
            clip_grad_by_total_norm_fp32(part.get_parameters(), max_norm=max_norm, total_norm=total_norm)


def set_learning_rate(optimizer: ChainedOptimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_mult"]
