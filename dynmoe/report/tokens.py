"""The token view: a checkpoint's experts for each token of a text."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from dynmoe.data.tokenizer import Tokenizer
from dynmoe.errors import UserError
from dynmoe.moe.layer import capture_plans
from dynmoe.report.images import Image
from dynmoe.report.page import write_page
from dynmoe.report.texts import Text
from dynmoe.routing import RoutingPlan
from dynmoe.train.checkpoint import write_atomically
from dynmoe.trained import TrainedModel

_POSITION_BUCKETS = 16
_TOP = 20
# Pieces of text that occur less often are not listed.
_FEW = 3


@dataclass(frozen=True)
class Document:
    """A text, with an image before it or without, and the plans of a forward pass over it alone.

    Attributes:
        source: shown above the documents of the same source.
        ids: of the tokens of the text.
        pieces: the text of each of these tokens.
        plans: by MoE layer, for the patches of the image and then the tokens.
        image: the image; None without one.
    """

    source: str
    ids: Sequence[int]
    pieces: Sequence[str]
    plans: Sequence[RoutingPlan]
    image: Image | None = None


def view_documents(documents: Sequence[Document], run: str, step: int, layers: Sequence[int]) -> dict[str, Any]:
    """The token view of any model's documents, such as images with text; see :func:`view_tokens`.

    Args:
        documents: those of the same source one after the other.
        run: name of the run.
        step: step of the model.
        layers: indices of the MoE layers.
    """
    sources = list(dict.fromkeys(document.source for document in documents))
    images: list[dict[str, Any]] = []
    tokens: list[dict[str, Any]] = []
    for document in documents:
        told: list[dict[str, Any]] = []
        if document.image is not None:
            image = document.image
            told += [
                {"id": None, "piece": image.name(patch), "image": len(images), "patch": patch}
                for patch in range(image.patches)
            ]
            images.append(image.data())
        told += [{"id": own, "piece": piece} for own, piece in zip(document.ids, document.pieces, strict=True)]
        source = sources.index(document.source)
        chosen = [_routes(plan) for plan in document.plans]
        tokens += [
            {**own, "source": source, "position": place, **_of_token(chosen, place)} for place, own in enumerate(told)
        ]
    window = 1 + max(token["position"] for token in tokens)
    return {
        "run": run, "step": step, "layers": list(layers), "sources": sources, "images": images, "tokens": tokens,
        "tables": tables(tokens, layers, sources, window),
    }  # fmt: skip


def view_tokens(model: TrainedModel, texts: Sequence[Text], num_tokens: int) -> dict[str, Any]:
    """Runs the model over the texts, in windows of the training length that each start like a document.

    The sources share the ``num_tokens`` tokens equally, as far as each has enough.

    Returns:
        Content of tokens.json: ``run``, ``step``, ``layers`` (indices), ``sources``; ``tokens``, each with ``id``,
        ``piece``, ``source`` (index), ``position`` and, by layer, ``experts`` and their ``gates``; and ``tables`` (see
        :func:`tables`). A byte of a character that is complete in its window also has this ``character``, and its index
        in it, ``byte``; if it has several ``bytes``, as tokens of byte-level tokenizers do, also their number. The
        ``character`` is then all that the tokens spell together, such as a space and a letter. A token that is a patch
        of one of the ``images`` has no id, but the index of the ``image`` and of the ``patch``.

    Raises:
        UserError: the model is dense, or there is no text.
    """
    layers = model.config.model.moe_layers
    if not layers:
        raise UserError(f"{model.config.run.path}: the model is dense, so no token chooses experts; use an MoE run")
    sources = sorted({text.source for text in texts})
    tokens: list[dict[str, Any]] = []
    window = max(1, model.config.data.sequence_length - 1)  # one position is for the end-of-document token
    left = dict.fromkeys(sources, max(1, num_tokens // max(1, len(sources))))
    for text in texts:
        ids = text.tokens(model)[: left[text.source]]
        source = sources.index(text.source)
        left[text.source] -= len(ids)
        for start in range(0, len(ids), window):
            tokens += _run_window(model, ids[start : start + window], source)
    if not tokens:
        raise UserError("--text: contains no token; use more text")
    return {
        "run": model.config.run.name, "step": model.step, "layers": layers, "sources": sources, "images": [],
        "tokens": tokens, "tables": tables(tokens, layers, sources, window),
    }  # fmt: skip


@torch.no_grad()
def _run_window(model: TrainedModel, ids: list[int], source: int) -> list[dict[str, Any]]:
    """Runs one forward pass over an end-of-document token and ``ids``; returns the routes of each of the ids."""
    with capture_plans(model.decoder.moe_layers) as plans:
        model.decoder.hidden(torch.tensor([[model.tokenizer.eod, *ids]], device=model.device))
    chosen = [_routes(plan) for plan in plans]
    return [
        {
            "id": token, "piece": piece, "source": source, "position": place - 1, **character,
            **_of_token(chosen, place),
        }
        for place, (token, piece, character) in enumerate(_read(model.tokenizer, ids), start=1)
    ]  # fmt: skip


def _read(tokenizer: Tokenizer, ids: Sequence[int]) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Yields each token, its piece, and the text of which it is only a part, with its place in it."""
    left = iter(ids)
    for text, length in tokenizer.written(ids):
        byte = 0
        for token in islice(left, length):
            piece = tokenizer.piece(token)
            size = len(tokenizer.raw(token))
            more = {"bytes": size} if size > 1 else {}
            yield token, piece, {} if piece == text else {"character": text, "byte": byte, **more}
            byte += size


def _routes(plan: RoutingPlan) -> tuple[list[list[int]], list[list[float]]]:
    """Returns the experts of each token, by decreasing gate, and their gates."""
    experts = []
    gates = []
    for map_E, gates_E in zip(plan.routing_map_TE.cpu(), plan.gates_TE.float().cpu(), strict=True):
        used = map_E.nonzero().flatten()
        used = used[gates_E[used].argsort(descending=True, stable=True)]
        experts.append(used.tolist())
        gates.append([round(gate, 4) for gate in gates_E[used].tolist()])
    return experts, gates


def _of_token(chosen: Sequence[tuple[list[list[int]], list[list[float]]]], place: int) -> dict[str, Any]:
    """The experts and gates of the token at ``place``, by layer."""
    return {"experts": [experts[place] for experts, _ in chosen], "gates": [gates[place] for _, gates in chosen]}


def _mean_used(token: dict[str, Any]) -> float:
    """Experts of a token, averaged over layers."""
    return sum(map(len, token["experts"])) / len(token["experts"])


def tables(
    tokens: Sequence[dict[str, Any]], layers: Sequence[int], sources: Sequence[str], window: int
) -> dict[str, Any]:
    """Tables of experts: each row has a ``name``, a ``count`` of tokens and their ``mean`` experts over all layers.

    ``most`` and ``fewest``: pieces by mean, if they occur at least three times. ``positions``: by position in the
    window of ``window`` tokens. ``ranks``: by frequency rank of the piece in this text. ``sources``. ``layers``: the
    mean of each layer, and in ``histogram`` the number of tokens that used 0, 1, 2, … experts. ``kinds``: patches of
    images, which the tables of pieces leave out, and text; each with the means of the ``layers``.
    """
    used = [_mean_used(token) for token in tokens]
    text = [token for token in tokens if "image" not in token]
    used_by_text = [_mean_used(token) for token in text]
    pieces = Counter(token["id"] for token in text)
    rank = {token: place for place, (token, _) in enumerate(pieces.most_common(), start=1)}
    shown = {token["id"]: token["piece"] for token in text}
    by_piece = [row for row in _grouped((t["id"] for t in text), used_by_text) if row["count"] >= _FEW]
    by_piece = [{**row, "name": shown[row["name"]]} for row in by_piece]
    by_mean = sorted(by_piece, key=lambda row: (row["mean"], row["name"]))
    width = -(-window // _POSITION_BUCKETS)
    positions = _grouped((token["position"] // width for token in tokens), used)
    ranks = _grouped((rank[token["id"]].bit_length() - 1 for token in text), used_by_text)
    patches = [token for token in tokens if "image" in token]
    return {
        "most": by_mean[::-1][:_TOP],
        "fewest": by_mean[:_TOP],
        "positions": [
            {**row, "name": f"{row['name'] * width} to {min((row['name'] + 1) * width, window) - 1}"}
            for row in positions
        ],
        "ranks": [{**row, "name": _span(2 ** row["name"], 2 ** (row["name"] + 1) - 1)} for row in ranks],
        "sources": [{**row, "name": sources[row["name"]]} for row in _grouped((t["source"] for t in tokens), used)],
        "layers": [_layer_row(tokens, place, layer) for place, layer in enumerate(layers)],
        "kinds": [_kind_row(name, own) for name, own in (("image", patches), ("text", text)) if own],
    }


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first} to {last}"


def _grouped(keys: Iterable[int], used: Sequence[float]) -> list[dict[str, Any]]:
    """Rows by ascending key."""
    groups: dict[int, list[float]] = defaultdict(list)
    for key, value in zip(keys, used, strict=True):
        groups[key].append(value)
    return [
        {"name": key, "count": len(values), "mean": round(sum(values) / len(values), 4)}
        for key, values in sorted(groups.items())
    ]


def _layer_row(tokens: Sequence[dict[str, Any]], place: int, layer: int) -> dict[str, Any]:
    counts = [len(token["experts"][place]) for token in tokens]
    histogram = [counts.count(number) for number in range(max(counts) + 1)]
    mean = round(sum(counts) / len(counts), 4)
    return {"name": f"layer {layer}", "count": len(tokens), "mean": mean, "histogram": histogram}


def _kind_row(name: str, tokens: Sequence[dict[str, Any]]) -> dict[str, Any]:
    by_layer = zip(*([len(experts) for experts in token["experts"]] for token in tokens), strict=True)
    means = [round(sum(counts) / len(counts), 4) for counts in by_layer]
    return {"name": name, "count": len(tokens), "mean": round(sum(means) / len(means), 4), "layers": means}


def write_view(view: dict[str, Any], output: Path) -> None:
    """Writes the page, and its data as JSON next to it."""
    write_atomically(output.with_suffix(".json"), json.dumps(view))
    write_page("tokens.html.j2", output, view=view)
