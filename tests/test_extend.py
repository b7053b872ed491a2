"""Longer contexts from trained runs: by the command, and by counting what it changes."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from dynmoe.config import load_config
from dynmoe.errors import UserError
from dynmoe.extend import extend
from dynmoe.model import Decoder
from dynmoe.trained import begin_run, open_decoder

VOCAB = 48
SHORT, LONG = 16, 64
FIELDS = [
    "model.hidden=32", "model.heads=2", "model.kv_heads=1", "model.layers=2", "model.moe.experts=4",
    "model.moe.expert_hidden=32", "model.init_std=0.1", "model.rope_theta=100", f"data.sequence_length={SHORT}",
]  # fmt: skip


def texts(seed: int, length: int) -> torch.Tensor:
    """Sequences in which each token is the one five positions before, after five random ones."""
    first = torch.randint(VOCAB, (16, 5), generator=torch.Generator().manual_seed(seed))
    return first.repeat(1, -(-(length + 1) // 5))[:, : length + 1]


def train(decoder: Decoder, steps: int, length: int) -> None:
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=3e-3)
    for step in range(steps):
        tokens = texts(step, length)
        optimizer.zero_grad()
        decoder(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()


@torch.no_grad()
def loss_by_position(decoder: Decoder) -> torch.Tensor:
    tokens = texts(10_000, LONG)
    return F.cross_entropy(decoder(tokens[:, :-1]).transpose(1, 2), tokens[:, 1:], reduction="none").mean(dim=0)


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A run that was trained on short sequences."""
    config = load_config(None, [*FIELDS, "run.name=short"])
    decoder = Decoder(config.model, VOCAB, seed=0)
    train(decoder, 300, SHORT)
    run = tmp_path_factory.mktemp("runs") / "short"
    begin_run(config, decoder, {}, run)
    return run


@pytest.mark.parametrize("kind", ["yarn", "linear"])
def test_loss_at_positions_beyond_the_old_length_falls(short, tmp_path, kind):
    before = loss_by_position(open_decoder(short).decoder)
    config = extend(short, tmp_path / "long", LONG, kind, ["optimizer.lr=1e-4"])
    assert config.data.sequence_length == LONG
    assert (config.model.rope_scaling.factor, config.model.rope_scaling.original_length) == (4.0, SHORT)
    assert config.optimizer.lr == 1e-4
    decoder = open_decoder(tmp_path / "long").decoder
    old = dict(open_decoder(short).decoder.named_parameters())
    assert all(torch.equal(weight, old[name]) for name, weight in decoder.named_parameters())
    train(decoder.train(), 60, LONG)
    after = loss_by_position(decoder.eval())
    assert before[5:SHORT].mean() < 0.2, "the short run has learned nothing"
    assert before[2 * SHORT :].mean() > 1.5, "the short run already knows long sequences"
    assert after[2 * SHORT :].mean() < before[2 * SHORT :].mean() / 3


def test_a_run_is_extended_again_relative_to_its_first_length(short, tmp_path):
    extend(short, tmp_path / "a", 32)
    config = extend(tmp_path / "a", tmp_path / "b", 128)
    assert (config.model.rope_scaling.factor, config.model.rope_scaling.original_length) == (8.0, SHORT)
    with pytest.raises(UserError, match=r"--kind linear: the positions of the run are stretched by yarn"):
        extend(tmp_path / "a", tmp_path / "c", 128, "linear")


def test_positions_that_are_stretched_further_stay_as_they_are(tmp_path):
    """As in a run on short sequences from a checkpoint of Llama 3.1, which reaches eight times its first length."""
    scaled = ["kind=llama3", "factor=8", f"original_length={SHORT}"]
    config = load_config(None, [*FIELDS, *(f"model.rope_scaling.{field}" for field in scaled), "run.name=far"])
    begin_run(config, Decoder(config.model, VOCAB, seed=0), {}, tmp_path / "far")
    for length, factor in ((2 * SHORT, 8.0), (16 * SHORT, 16.0)):
        longer = extend(tmp_path / "far", tmp_path / f"{length}", length, "llama3").model.rope_scaling
        assert (longer.factor, longer.original_length) == (factor, SHORT)


def test_an_imported_model_is_only_stretched_beyond_its_own_length(tmp_path):
    config = load_config(None, [*FIELDS, "run.name=short"])
    imported = {"imported/config.json": json.dumps({"max_position_embeddings": LONG}).encode()}
    begin_run(config, Decoder(config.model, VOCAB, seed=0), imported, tmp_path / "short")
    known = extend(tmp_path / "short", tmp_path / "known", LONG)
    assert known.data.sequence_length == LONG
    assert known.model.rope_scaling == config.model.rope_scaling
    for run in ("short", "known"):
        longer = extend(tmp_path / run, tmp_path / f"{run}_longer", 2 * LONG).model.rope_scaling
        assert (longer.kind, longer.factor, longer.original_length) == ("yarn", 2.0, LONG)


def test_an_imported_model_with_linear_positions_is_stretched_relative_to_its_first_length(tmp_path):
    """A checkpoint has only the factor, and the length that it reaches with it."""
    scaled = ["model.rope_scaling.kind=linear", "model.rope_scaling.factor=4", "run.name=linear"]
    config = load_config(None, [*FIELDS, *scaled])
    imported = {"imported/config.json": json.dumps({"max_position_embeddings": 4 * SHORT}).encode()}
    begin_run(config, Decoder(config.model, VOCAB, seed=0), imported, tmp_path / "linear")
    longer = extend(tmp_path / "linear", tmp_path / "longer", 8 * SHORT, "linear").model.rope_scaling
    assert (longer.factor, longer.original_length) == (8.0, SHORT)


@pytest.mark.parametrize("length", [SHORT, 0])
def test_what_is_not_longer_is_refused(short, tmp_path, length):
    with pytest.raises(UserError, match=rf"--length {length}: is not longer than the sequences of the run \(16\)"):
        extend(short, tmp_path / "long", length)
    with pytest.raises(UserError, match="exists; name a new directory"):
        extend(short, short, LONG)
