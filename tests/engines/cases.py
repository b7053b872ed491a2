"""Functions that engine tests run on the ranks of a pool: short training runs on synthetic tokens."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F

from dynmoe.config import Config, load_config
from dynmoe.config.constants import IGNORED
from dynmoe.data.batches import Batch
from dynmoe.engines import make_engine
from dynmoe.errors import UserError
from dynmoe.model import Decoder
from dynmoe.train.engine import take_step
from dynmoe.train.optimizer import parameter_groups
from tests.engines.plain_muon import PlainMuon

VOCAB = 64
LENGTH = 24
GLOBAL_BATCH = 8


def config_for(*overrides: str) -> Config:
    base = [
        "model.hidden=32", "model.heads=2", "model.kv_heads=1", "model.layers=2", "model.moe.experts=4",
        "model.moe.expert_hidden=32", "model.init_std=0.1", f"data.sequence_length={LENGTH}",
        f"train.global_batch={GLOBAL_BATCH}", "optimizer.lr=3e-3",
    ]  # fmt: skip
    return load_config(None, [*base, *overrides])


def batch_of_step(step: int) -> torch.Tensor:
    """The global batch [B, S + 1] of a step: short cycles with noise, so that a model can learn them."""
    generator = torch.Generator().manual_seed(step)
    start = torch.randint(VOCAB, (GLOBAL_BATCH, 1), generator=generator)
    tokens = (start + 3 * torch.arange(LENGTH + 1)) % VOCAB
    noise = torch.randint(VOCAB, tokens.shape, generator=generator)
    return torch.where(torch.rand(tokens.shape, generator=generator) < 0.2, noise, tokens)


def micro_batches(config: Config, step: int, data_rank: int = 0, data_size: int = 1) -> list[Batch]:
    tokens = batch_of_step(step)
    size = config.train.micro_batch
    starts = range(data_rank * size, GLOBAL_BATCH, data_size * size)
    return [Batch(tokens[s : s + size, :-1], tokens[s : s + size, 1:]) for s in starts]


def keep_maps(layers: list[Any]) -> dict[int, list[torch.Tensor]]:
    """Records the routing maps of all later forward passes, by layer; those of recomputations again."""
    maps: dict[int, list[torch.Tensor]] = {layer.layer: [] for layer in layers}
    for layer in layers:
        own = maps[layer.layer]
        layer.router.register_forward_hook(lambda m, inputs, plan, own=own: own.append(plan.routing_map_TE.clone()))
    return maps


def train(
    overrides: list[str], first: int, last: int, load: str = "", save: str = "", save_before: int | None = None
) -> dict[str, Any]:
    """Trains steps ``first`` to ``last`` - 1; returns losses, norms, routing maps, statistics and the final state.

    Saves a checkpoint in ``save`` before step ``save_before``, by default after all steps.
    """
    config = config_for(*overrides)
    config.check_world(dist.get_world_size())
    engine = make_engine(config, VOCAB)
    if load:
        engine.load(Path(load))
    maps = keep_maps(engine.layers)
    losses = []
    further = []
    norms = []
    rows = []
    statistics = []
    events = []
    attentions = 0
    for step in range(first, last):
        if step == save_before:
            save_state(engine, save)
        batches = micro_batches(config, step, engine.data_rank, engine.data_size)
        with patch.object(F, "scaled_dot_product_attention", wraps=F.scaled_dot_product_attention) as attention:
            gradients, changes = take_step(engine, batches, config.optimizer.lr, record=True)
            events += changes
        attentions += attention.call_count
        report = engine.report()
        losses.append(gradients.lm_loss)
        further.append(gradients.mtp_loss)
        norms.append(gradients.grad_norm)
        rows.append(report.routed_rows)
        statistics.append({layer: vector.tolist() for layer, vector in report.statistics.items()})
    if save and save_before is None:
        save_state(engine, save)
    return {
        "losses": losses, "further": further, "norms": norms, "maps": maps, "rows": rows, "statistics": statistics,
        "events": events, "state": whole_state(engine), "place": place(engine), "attentions": attentions,
        "groups": settings(engine),
    }  # fmt: skip


def settings(engine: Any) -> list[dict[str, Any]]:
    """Hyperparameters of each optimizer parameter group."""
    if engine.config.engine == "deepspeed":
        return []
    return [{name: value for name, value in g.items() if name != "params"} for g in engine.optimizer.param_groups]


def refusal(overrides: list[str], load: str) -> str:
    """The error with which the engine refuses a checkpoint."""
    engine = make_engine(config_for(*overrides), VOCAB)
    try:
        engine.load(Path(load))
    except UserError as error:
        return str(error)
    return "no error was raised"


def save_state(engine: Any, directory: str) -> None:
    Path(directory).mkdir(parents=True, exist_ok=True)
    dist.barrier()
    made = engine.snapshot(Path(directory))
    made.write()
    dist.barrier()
    made.finish()
    dist.barrier()


def warnings_of_a_save(overrides: list[str], directory: str) -> list[str]:
    """What Megatron says when it compares the parts of a checkpoint that are the same on all ranks."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("megatron.core.dist_checkpointing.validation")
    logger.addHandler(handler)
    try:
        save_state(make_engine(config_for(*overrides), VOCAB), directory)
    finally:
        logger.removeHandler(handler)
    return said


def place(engine: Any) -> tuple[int, int]:
    """The data-parallel rank (which sequences) and tensor-parallel rank (which part of each) of a rank."""
    group = engine.context.groups.sequence
    return engine.data_rank, 0 if group is None else dist.get_rank(group)


def whole_state(engine: Any) -> dict[str, torch.Tensor]:
    """All buffers of this rank, and all its parameters with their fp32 masters and moments.

    Under Megatron, parameters have Megatron's layout, and masters and moments are this rank's flat shards.
    """
    state = {}
    for layer in engine.layers:
        buffers = layer.named_buffers()
        state |= {f"buffer layers.{layer.layer}.moe.{name}": buffer.clone() for name, buffer in buffers}
    if engine.config.engine == "deepspeed":
        for name, parameter in engine.module.named_parameters():
            with engine.state.whole(engine.module):
                state[name] = parameter.detach().clone()
            state |= {f"{name}|{part}": value.clone() for part, value in engine.state.get(parameter).items()}
        return state
    from dynmoe.engines.megatron.weights import weights

    for model in engine.models:
        for weight in weights(model, engine.config.model):
            state[weight.name] = weight.parameter.detach().clone()
            shards, _ = engine.state.shard(weight.parameter)
            state |= {f"{weight.name}|{part}": value.clone() for part, value in shards.items()}
    return state


def train_into_nan(overrides: list[str], layer: int, rank: int) -> tuple[str, bool]:
    """Trains two steps, then one in which the router of ``layer`` sees NaN on ``rank``; see :func:`failing_step`."""
    engine = make_engine(config_for(*overrides), VOCAB)
    for step in range(2):
        step_once(engine, step)
    if dist.get_rank() == rank:
        (router,) = (own.router for own in engine.layers if own.layer == layer)
        router.register_forward_pre_hook(lambda module, inputs: (inputs[0] * float("nan"),))
    return failing_step(engine, 2)


def step_that_fails(overrides: list[str]) -> tuple[str, bool]:
    """See :func:`failing_step`, for the first step."""
    return failing_step(make_engine(config_for(*overrides), VOCAB), 0)


def step_once(engine: Any, step: int) -> None:
    batches = micro_batches(engine.config, step, engine.data_rank, engine.data_size)
    take_step(engine, batches, engine.config.optimizer.lr)


def failing_step(engine: Any, step: int) -> tuple[str, bool]:
    """The error that stops the step, and whether the state is unchanged."""
    before = whole_state(engine)
    try:
        step_once(engine, step)
    except UserError as error:
        after = whole_state(engine)
        return str(error), all(torch.equal(value, after[name]) for name, value in before.items())
    return "no error was raised", False


def moved(batch: Batch, depth: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The token and the label ``depth`` positions further, one by one; token 0 and no label at the end."""
    tokens, labels = torch.zeros_like(batch.tokens_BS), torch.full_like(batch.labels_BS, IGNORED)
    for position in range(LENGTH - depth):
        tokens[:, position] = batch.tokens_BS[:, position + depth]
        labels[:, position] = batch.labels_BS[:, position + depth]
    return tokens, labels


def train_plainly(overrides: list[str], steps: int) -> dict[str, Any]:
    """Trains the plain model with torch's AdamW in a simple loop, without an engine.

    Returns also the first moments after step 0 (a tenth of the clipped gradients), by checkpoint key.
    """
    config = config_for(*overrides)
    model = Decoder(config.model, VOCAB, config.train.seed)
    maps = keep_maps(model.moe_layers)
    settings = config.optimizer
    betas = (settings.beta1, settings.beta2)
    optimizer: Any = torch.optim.AdamW(parameter_groups(model, config), lr=settings.lr, betas=betas, eps=settings.eps)
    if settings.kind == "muon":
        optimizer = PlainMuon(model, config)
    losses = []
    further = []
    norms = []
    moments = {}
    for step in range(steps):
        optimizer.zero_grad()
        batches = micro_batches(config, step)
        total = 0.0
        total_further = 0.0
        for number, batch in enumerate(batches):
            ahead = [moved(batch, depth) for depth in range(1, config.model.mtp.layers + 1)]
            with model.context.override(
                micro_batch=number, loss_scale=1.0 / len(batches), target_experts=config.budget.experts_per_token
            ):
                loss = model(batch.tokens_BS, batch.labels_BS, ahead=ahead) / len(batches)
            loss.backward()
            total += loss.item()
            total_further += model.loss_ahead.item() / len(batches) if ahead else 0.0
        losses.append(total)
        further.append(total_further)
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_grad).item())
        optimizer.step()
        if step == 0:
            named = {name: optimizer.state[p]["exp_avg"].clone() for name, p in model.named_parameters()}
            for name, value in named.items():
                parts = {name: value}
                if ".experts." in name:
                    parts = {f"{name}.{expert}": part.clone() for expert, part in enumerate(value)}
                moments |= {f"{key}|exp_avg": part for key, part in parts.items()}
    return {
        "losses": losses, "further": further, "norms": norms, "maps": maps, "moments": moments, "place": (0, 0)
    }  # fmt: skip


def forward_only(overrides: list[str]) -> dict[str, Any]:
    """Losses of two texts, with two batches and one, and logits of a sequence whose length no layout divides."""
    config = config_for(*overrides)
    engine = make_engine(config, VOCAB)
    batches = micro_batches(config, 0, engine.data_rank, engine.data_size)
    tokens = torch.arange(7)[None] * 5 % VOCAB
    return {"losses": engine.evaluate(batches[:3], [0, 1, 0], 2), "logits": engine.logits(tokens)}


def to_canonical(overrides: list[str], source: str, target: str) -> None:
    """Converts a Megatron checkpoint."""
    from dynmoe.engines.megatron import conversion

    Path(target).mkdir(parents=True)
    conversion.to_canonical(config_for("engine=megatron", *overrides), Path(source), Path(target))
