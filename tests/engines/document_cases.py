"""What runs on the ranks of a pool for the tests of documents that do not see each other."""

from __future__ import annotations

from typing import Any

import torch

from dynmoe.config.constants import IGNORED
from dynmoe.data.batches import Batch
from dynmoe.engines import make_engine
from dynmoe.model import Decoder
from dynmoe.train.engine import take_step
from dynmoe.train.optimizer import parameter_groups
from tests.engines.cases import GLOBAL_BATCH, LENGTH, VOCAB, config_for, whole_state

END = 0
# The first documents of a sequence have these lengths, the last one has the rest. The last sequence has a boundary
# between the two halves that context and tensor parallelism make.
LENGTHS = [(5, 9), (1, 12), (10, 7), (4, 8)] * (GLOBAL_BATCH // 4)


def starts() -> torch.Tensor:
    """Where the document of each token starts, [B, S]: three documents in each sequence."""
    place_S = torch.arange(LENGTH)
    return torch.stack([(place_S >= a) * a + (place_S >= a + b) * b for a, b in LENGTHS])


def text(seed: int) -> torch.Tensor:
    """Sequences [B, S + 1] whose second documents have odd tokens and never change; the other tokens are even."""
    middle = torch.zeros(GLOBAL_BATCH, LENGTH + 1, dtype=torch.bool)
    for row, (a, b) in enumerate(LENGTHS):
        middle[row, a + 1 : a + b] = True  # its first token is END
    generator = torch.Generator().manual_seed(seed)
    even = 2 * torch.randint(1, VOCAB // 2, middle.shape, generator=generator)
    odd = 2 * torch.randint(VOCAB // 2, middle.shape, generator=torch.Generator().manual_seed(0)) + 1
    tokens = torch.where(middle, odd, even)
    for row, (a, b) in enumerate(LENGTHS):
        tokens[row, [a, a + b]] = END
    return tokens


def batches_of(engine: Any, seed: int, masked: bool, all_labels: bool) -> list[Batch]:
    """The micro-batches of a rank; only the odd tokens are predicted unless ``all_labels``."""
    tokens = text(seed)
    labels = tokens[:, 1:]
    if not all_labels:
        labels = labels.masked_fill(labels % 2 == 0, IGNORED)
    return micro_batches(engine, Batch(tokens[:, :-1], labels, starts() if masked else None))


def micro_batches(engine: Any, whole: Batch) -> list[Batch]:
    """The micro-batches of a rank."""
    size = engine.config.train.micro_batch
    rows = range(engine.data_rank * size, GLOBAL_BATCH, engine.data_size * size)
    return [whole._map(lambda tensor, row=row: tensor[row : row + size].clone()) for row in rows]


def first_passes(layers: list[Any]) -> list[list[torch.Tensor]]:
    """Records the routing map of each micro-batch, by layer, without recomputations."""
    passes = []
    for layer in layers:
        own: list[torch.Tensor] = []

        def keep(router: Any, inputs: Any, plan: Any, layer: Any = layer, own: list[torch.Tensor] = own) -> None:
            if not layer.context.step.recomputing:
                own.append(plan.routing_map_TE.clone())

        layer.router.register_forward_hook(keep)
        passes.append(own)
    return passes


def one_step(overrides: list[str], seed: int, masked: bool) -> tuple[float, Any, torch.Tensor]:
    """Loss of odd tokens; then the rows of their embedding after a step over all tokens, and their routing in it.

    A large epsilon makes AdamW's update nearly proportional to the gradient.
    """
    engine = make_engine(config_for(*overrides, "optimizer.eps=1", "optimizer.clip_grad=0"), VOCAB)
    loss = engine.compute_gradients(batches_of(engine, seed, masked, all_labels=False), record=False).lm_loss
    engine.skip()
    passes = first_passes(engine.layers)
    batches = batches_of(engine, seed, masked, all_labels=True)
    take_step(engine, batches, lr=1.0)
    positions_P = engine.positions(LENGTH)
    odd = [batch.tokens_BS[:, positions_P].flatten() % 2 == 1 for batch in batches]
    routing = [own[rows] for maps in passes for own, rows in zip(maps, odd, strict=True)]
    state = {name: value for name, value in whole_state(engine).items() if name.endswith("w_embed_VD")}
    embedding = [value[1::2] for value in state.values()]  # shards begin with an even token
    return loss, embedding, torch.cat(routing) if routing else torch.empty(0)


def influences(overrides: list[str], masked: bool) -> dict[str, float]:
    """How much of the second documents changes with all others: loss, gradient of the embedding, routing."""
    (loss, before, routes), (other_loss, after, others) = (one_step(overrides, seed, masked) for seed in (1, 2))
    return {
        "loss": abs(loss - other_loss),
        "gradient": max([(a - b).abs().max().item() for a, b in zip(before, after, strict=True)], default=0.0),
        "routing": (routes != others).float().mean().item() if len(routes) else 0.0,
    }


def packed_batch(step: int) -> Batch:
    """The global batch of a step: masked documents whose first token is not predicted, and few labels in some rows."""
    tokens = text(step)
    batch = Batch(tokens[:, :-1], tokens[:, 1:].clone(), starts())
    batch.labels_BS[batch.tokens_BS == END] = IGNORED
    batch.labels_BS[batch.tokens_BS[:, 0] % 4 == 2, 5:] = IGNORED
    return batch


def train_packed(overrides: list[str], steps: int) -> list[float]:
    """Losses of a few steps over :func:`packed_batch`, whose passes have different numbers of labels that count."""
    engine = make_engine(config_for(*overrides, "data.predict_first_token=false"), VOCAB)
    lr = engine.config.optimizer.lr
    batches = (micro_batches(engine, packed_batch(step)) for step in range(steps))
    return [take_step(engine, own, lr)[0].lm_loss for own in batches]


def train_packed_plainly(overrides: list[str], steps: int) -> list[float]:
    """The same with the plain model and torch's AdamW: each step is one pass over all sequences."""
    config = config_for(*overrides)
    settings = config.optimizer
    model = Decoder(config.model, VOCAB, config.train.seed)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config), lr=settings.lr, betas=(settings.beta1, settings.beta2), eps=settings.eps
    )
    losses = []
    for step in range(steps):
        batch = packed_batch(step).looking_ahead(config.model.mtp.layers)
        ahead = [(further.tokens_BS, further.labels_BS) for further in batch.ahead]
        optimizer.zero_grad()
        loss = model(batch.tokens_BS, batch.labels_BS, batch.start_BS, ahead=ahead)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_grad)
        optimizer.step()
        losses.append(loss.item())
    return losses
