"""Megatron's distributed optimizer with our parameter groups, and access to what it holds of each parameter."""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer, DistributedOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from torch import Tensor, nn

from dynmoe.config import Config
from dynmoe.engines.state_names import MASTER, MOMENTS
from dynmoe.train.optimizer import parameter_groups


def make_optimizer(config: Config, chunks: Sequence[DistributedDataParallel]) -> ChainedOptimizer:
    """AdamW over all parts of the model, its state spread over the ranks that hold the same parameters.

    The moments exist from the start (zeros), as after a first step of size zero.
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
        config_overrides=_overrides(config, chunks),
        use_gloo_process_groups=True,
    )  # fmt: skip
    for part in optimizer.chained_optimizers:
        for group in part.param_groups:
            group["weight_decay"] = settings.weight_decay * group["wd_mult"]
        if isinstance(part.optimizer, torch.optim.AdamW):
            _prepare_torch_adam(part)
        else:
            part.init_state_fn(part.optimizer, part.config)
    return optimizer


def _overrides(config: Config, chunks: Sequence[DistributedDataParallel]) -> dict[ParamKey, dict[str, float]]:
    """What our groups have different from the default: no decay, another learning rate."""
    groups = [group for chunk in chunks for group in parameter_groups(chunk, config)]
    names = {id(parameter): group["name"] for group in groups for parameter in group["params"]}
    factor = config.model.router.lr_factor
    # The same on every rank, whatever it holds: Megatron compares them.
    values = {
        "no_decay": {"wd_mult": 0.0},
        "router": {"lr_mult": factor},
        "router_no_decay": {"wd_mult": 0.0, "lr_mult": factor},
    }

    def key(name: str) -> ParamKey:
        return ParamKey(predicate=ParamPredicate(name, lambda parameter: names.get(id(parameter)) == name))

    different = {name: {field: x for field, x in fields.items() if x != 1.0} for name, fields in values.items()}
    return {key(name): fields for name, fields in different.items() if fields}


def _prepare_torch_adam(part: DistributedOptimizer) -> None:
    """Makes torch's AdamW, which stands in where there is no fused one, fit Megatron's checkpoints.

    It counts steps in a tensor for each parameter, which Megatron does not expect among the moments; and a rank may
    hold no part of any expert, where Megatron still asks for the steps.
    """
    for group in part.optimizer.param_groups:
        group["fused"] = True
        for tensor in group["params"]:
            part.optimizer.state[tensor] = {
                "step": torch.zeros((), dtype=torch.float32, device=tensor.device),
                **{name: torch.zeros_like(tensor) for name in MOMENTS},
            }
    if not part.optimizer.state:
        part.optimizer.state["nothing"] = {"step": torch.zeros(())}
    part._get_main_param_and_optimizer_states = MethodType(_held, part)
    part._set_main_param_and_optimizer_states = MethodType(_hold, part)


def _held(part: DistributedOptimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """This rank's shards of the fp32 master and the moments of a parameter, flat."""
    group, order = part.model_param_group_index_map[parameter]
    main = part.optimizer.param_groups[group]["params"][order]
    return {"param": main.detach(), **{name: part.optimizer.state[main][name] for name in MOMENTS}}


@torch.no_grad()
def _hold(part: DistributedOptimizer, parameter: nn.Parameter, tensors: dict[str, Tensor]) -> None:
    for name, held in _held(part, parameter).items():
        held.copy_(tensors[name])


class OptimizerState:
    """fp32 masters and Adam moments behind the parameters of this rank, of which it holds a shard each."""

    def __init__(self, optimizer: ChainedOptimizer) -> None:
        self._parts = [part for part in optimizer.chained_optimizers if not part.is_stub_optimizer]

    def set_step(self, step: int) -> None:
        """Says how many optimizer steps were taken."""
        for part in self._parts:
            if isinstance(part.optimizer, torch.optim.AdamW):
                for state in part.optimizer.state.values():
                    # One for each: Megatron gives all of them the same tensor, to be added to.
                    state["step"] = torch.full_like(state["step"], step)
            elif step > 0:  # fused ones count from the first step on, in their groups
                for group in part.optimizer.param_groups:
                    group["step"] = step

    def shard(self, parameter: nn.Parameter) -> tuple[dict[str, Tensor], int]:
        """This rank's part of the flat master and moments, by name, and where in the parameter it begins.

        Empty for a parameter that other ranks hold all of.
        """
        for part in self._parts:
            if parameter in part.model_param_group_index_map:
                start = part._get_model_param_range_map(parameter)["param"].start
                held = part._get_main_param_and_optimizer_states(parameter)
                return {MASTER: held["param"], **{name: held[name] for name in MOMENTS}}, start
        return {}, 0

    @torch.no_grad()
    def set(self, parameter: nn.Parameter, values: dict[str, Tensor]) -> None:
        """Puts whole values in place: master and moments, as far as this rank holds them, and the parameter."""
        parameter.copy_(values[MASTER])
        shards, start = self.shard(parameter)
        for part, held in shards.items():
            held.copy_(values[part].flatten()[start : start + held.numel()])

    @torch.no_grad()
    def renew(self, parameter: nn.Parameter, index: tuple[int | slice, ...], fresh: Tensor) -> None:
        """See :class:`dynmoe.moe.adaptation.ParameterRenewal`; nothing is exchanged, as all ranks do the same."""
        renewed = torch.zeros_like(parameter, dtype=torch.bool)
        renewed[index] = True
        values = torch.zeros_like(parameter, dtype=torch.float32)
        values[index] = fresh
        parameter[index] = fresh.to(parameter.dtype)
        shards, start = self.shard(parameter)
        for part, held in shards.items():
            mine = slice(start, start + held.numel())
            new = values.flatten()[mine] if part == MASTER else torch.zeros_like(held)
            held.copy_(torch.where(renewed.flatten()[mine], new, held))


def clip(optimizer: ChainedOptimizer, ceiling: float, norm: float) -> None:
    """Scales the gradient, whose norm is ``norm``, to a norm of at most ``ceiling`` (0: leaves it)."""
    for part in optimizer.chained_optimizers:
        if ceiling > 0 and not part.is_stub_optimizer and part.get_parameters():
            clip_grad_by_total_norm_fp32(part.get_parameters(), max_norm=ceiling, total_norm=norm)


def set_learning_rate(optimizer: ChainedOptimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_mult"]
