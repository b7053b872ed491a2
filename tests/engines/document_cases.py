"""What runs on the ranks of a pool for the tests of documents that do not see each other."""

from __future__ import annotations

from typing import Any

import torch

from dynmoe.config.constants import IGNORED
from dynmoe.data.batches import Batch
from dynmoe.engines import make_engine
from dynmoe.train.engine import take_step
from tests.engines.cases import GLOBAL_BATCH, LENGTH, VOCAB, config_for, whole_state

END = 0
# The first documents of a sequence have these lengths, the last one has the rest.
LENGTHS = [(5, 9), (1, 12), (10, 7), (4, 4)] * (GLOBAL_BATCH // 4)


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
    whole = Batch(tokens[:, :-1], labels, starts() if masked else None)
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


def one_step(overrides: list[str], seed: int, masked: bool, all_labels: bool) -> tuple[float, Any, torch.Tensor]:
    """Loss, the rows of the embedding of odd tokens after a step, and the routing of odd tokens.

    A large epsilon makes AdamW's update nearly proportional to the gradient.
    """
    engine = make_engine(config_for(*overrides, "optimizer.eps=1", "optimizer.clip_grad=0"), VOCAB)
    passes = first_passes(engine.layers)
    batches = batches_of(engine, seed, masked, all_labels)
    gradients, _ = take_step(engine, batches, lr=1.0)
    positions_P = engine.positions(LENGTH)
    odd = [batch.tokens_BS[:, positions_P].flatten() % 2 == 1 for batch in batches]
    routing = [own[rows] for maps in passes for own, rows in zip(maps, odd, strict=True)]
    state = {name: value for name, value in whole_state(engine).items() if name.endswith("w_embed_VD")}
    embedding = [value[1::2] for value in state.values()]  # shards begin with an even token
    return gradients.lm_loss, embedding, torch.cat(routing) if routing else torch.empty(0)


def influences(overrides: list[str], masked: bool) -> dict[str, float]:
    """How much of the second documents changes with all others: loss, gradient of the embedding, routing."""
    found = {}
    losses = [one_step(overrides, seed, masked, all_labels=False)[0] for seed in (1, 2)]
    found["loss"] = abs(losses[0] - losses[1])
    (_, before, routes), (_, after, others) = (one_step(overrides, seed, masked, all_labels=True) for seed in (1, 2))
    found["gradient"] = max([(a - b).abs().max().item() for a, b in zip(before, after, strict=True)], default=0.0)
    found["routing"] = (routes != others).float().mean().item() if len(routes) else 0.0
    return found


def train_packed(overrides: list[str], steps: int) -> list[float]:
    """Losses of a few steps over masked documents, in which the first token of a document is not predicted."""
    engine = make_engine(config_for(*overrides, "data.predict_first_token=false"), VOCAB)
    losses = []
    for step in range(steps):
        batches = batches_of(engine, step, masked=True, all_labels=True)
        for batch in batches:  # of one sequence and of two: passes count different numbers of labels
            batch.labels_BS[batch.tokens_BS == END] = IGNORED
            batch.labels_BS[batch.tokens_BS[:, 0] % 4 == 2, 5:] = IGNORED
        losses.append(take_step(engine, batches, engine.config.optimizer.lr)[0].lm_loss)
    return losses
