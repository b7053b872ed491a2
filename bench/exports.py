"""Runs and exports of models with random weights, for benchmarks of generation and serving."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from data_prep.build import build
from data_prep.recipe import Recipe
from dynmoe.config import load_config
from dynmoe.data.tokenizer_files import open_tokenizer
from dynmoe.hf.export import export
from dynmoe.model import Decoder
from dynmoe.moe.router import Router
from dynmoe.routers import TopP
from dynmoe.trained import begin_run


def write_corpus(folder: Path, vocab_size: int) -> Path:
    """Prepares a corpus of invented words for its tokenizer, which an export needs."""
    (folder / "text").mkdir()
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefghijklmnopqrstuvwxyz", k=8)) for _ in range(4 * vocab_size)]
    for number in range(100):
        (folder / "text" / f"{number}.txt").write_text(" ".join(words[number::100] * 2) + "\n")
    recipe = Recipe([str(folder / "text")], vocab_size=vocab_size, validation_fraction=0.1)
    build(recipe, folder / "corpus", workers=1)
    return folder / "corpus"


def export_random(
    corpus: Path, run: Path, rows: int, overrides: Sequence[str], mean_k: float | None = None, own_code: bool = False
) -> Path:
    """Creates a run of a model with random weights, and its export beside it.

    Args:
        corpus: its tokenizer is that of the run.
        run: directory of the run.
        rows: of the embedding.
        overrides: fields of the configuration.
        mean_k: experts per token to which p is set in each layer; None for other routers.
        own_code: export with our code in any case.
    """
    place = [f"data.dirs=[{corpus}]", f"run.dir={run.parent}", f"run.name={run.name}"]
    config = load_config(None, [*overrides, *place])
    decoder = Decoder(config.model, rows, seed=0).eval()
    if mean_k is not None:
        _set_p(decoder, mean_k)
    begin_run(config, decoder, open_tokenizer(corpus).files, run)
    export(run, run.with_name(f"{run.name}_out"), own_code=own_code)
    return run.with_name(f"{run.name}_out")


@torch.no_grad()
def _set_p(decoder: Decoder, mean_k: float) -> None:
    """Spreads the scores of each router, and sets p so that these tokens get ``mean_k`` experts on average."""

    def fit(router: Router, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(router.spec, TopP)
        router.get_parameter("weight_ED").normal_(0.0, 2.0 / inputs[0].shape[1] ** 0.5)
        router.spec.fit(router, router.spec.logits_TE(router, inputs[0]), mean_k)

    hooks = [layer.router.register_forward_pre_hook(fit) for layer in decoder.moe_layers]
    decoder(torch.randint(3, len(decoder.w_embed_VD), (16, 64), generator=torch.Generator().manual_seed(0)))
    for hook in hooks:
        hook.remove()
