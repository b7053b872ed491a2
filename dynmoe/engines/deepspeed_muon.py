"""Muon over the parts of matrices that DeepSpeed's optimizers hold."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from deepspeed.moe.utils import is_moe_param
from torch import nn

from dynmoe.config import Config
from dynmoe.engines.deepspeed_state import OptimizerState
from dynmoe.engines.whole_matrices import MatrixExchange, Part, Place, Unit, held_by_unit
from dynmoe.model import Decoder
from dynmoe.model.matrices import rows_of_matrices
from dynmoe.train.muon import MuonAdamW


@contextlib.contextmanager
def introduced(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """The context in which DeepSpeed takes over an optimizer, which may be Muon.

    In bf16 without ZeRO, DeepSpeed takes a step in which all gradients are zero, before :func:`connect` can know the
    parts of the matrices. The learning rate is 0 meanwhile, or weight decay would change the initial weights. DeepSpeed
    also warns of classes that it does not know.
    """
    logger = logging.getLogger("DeepSpeed")
    level = logger.level
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    if isinstance(optimizer, MuonAdamW):
        logger.setLevel(logging.ERROR)
        numbers = (group["number"] for group in optimizer.param_groups)
        optimizer.orthogonalize = dict.fromkeys(numbers, lambda momenta, gradients: None)
    try:
        yield
    finally:
        logger.setLevel(level)
        for group, lr in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = lr


def connect(
    config: Config, module: Decoder, muon: MuonAdamW, groups: Sequence[Sequence[nn.Parameter]], state: OptimizerState,
    ranks: dist.ProcessGroup | None, expert_ranks: dist.ProcessGroup | None,
) -> None:  # fmt: skip
    """Lets Muon orthogonalize whole matrices; collective.

    Args:
        config: of the run.
        module: the model.
        muon: the optimizer, within DeepSpeed's.
        groups: the model's parameters in each of its parameter groups.
        state: of the optimizer.
        ranks: data-parallel ranks; None for one.
        expert_ranks: ranks with the same experts; None for one.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    for group, parameters in zip(muon.param_groups, groups, strict=True):
        if not group["muon"]:
            continue
        units: list[Unit] = []
        held: list[tuple[Part, Place]] = []
        for number, parameter in enumerate(parameters):
            stack, shape = (len(parameter), parameter.shape[1:]) if parameter.dim() == 3 else (1, parameter.shape)
            rows = rows_of_matrices(config.model, names[id(parameter)], shape[0])
            unit = Unit.unsharded(tuple(shape), rows)
            if (own := state.held(parameter)) is not None:
                tensor = 0 if state.partitioned else number
                held += held_by_unit(len(units), unit.size, 0, own.start, own.length, Place(tensor, own.offset))
            units += [unit] * stack
        among = expert_ranks if is_moe_param(parameters[0]) else ranks
        device = parameters[0].device
        muon.orthogonalize[group["number"]] = MatrixExchange(units, held, among, dtype, device)
