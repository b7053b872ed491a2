"""Scaled rotary positions against transformers' own, in every part of the frequencies."""

from __future__ import annotations

import math

import pytest
import torch

from dynmoe.hf.fields import write_rope
from dynmoe.model import Decoder
from dynmoe.model.rotary import frequencies, halves, neighbours, rotary_tables
from tests.moe.cases import tiny_model

SCALED = {
    "linear": ["kind=linear", "factor=3"],
    "yarn": ["kind=yarn", "factor=8", "original_length=64"],
    "yarn, given": ["kind=yarn", "factor=8", "original_length=64", "attention_factor=0.9", "truncate=false"],
    "yarn, narrow": ["kind=yarn", "factor=2.5", "original_length=512", "beta_fast=4", "beta_slow=2"],
    "yarn, no turn": ["kind=yarn", "factor=2", "original_length=2"],
    "llama3": ["kind=llama3", "factor=8", "original_length=64"],
    "llama3, given": ["kind=llama3", "factor=4", "original_length=128", "low_freq_factor=2", "high_freq_factor=16"],
}


def model_of(name: str):
    return tiny_model(
        "model.head_dim=32", "model.rope_theta=500", *(f"model.rope_scaling.{own}" for own in SCALED[name])
    )


@pytest.mark.parametrize("name", SCALED)
def test_frequencies_and_tables_are_those_of_transformers(name):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    model = model_of(name)
    config = LlamaConfig(head_dim=32, hidden_size=64, num_attention_heads=2, max_position_embeddings=512,
                         rope_parameters=write_rope(model.rope_theta, model.rope_scaling))  # fmt: skip
    theirs = LlamaRotaryEmbedding(config)
    ours = frequencies(model, torch.device("cpu"))
    torch.testing.assert_close(ours, theirs.inv_freq, rtol=1e-6, atol=0)
    plain = frequencies(tiny_model("model.head_dim=32", "model.rope_theta=500"), torch.device("cpu"))
    assert torch.allclose(ours, plain) == (name == "yarn, no turn")
    cos, sin = rotary_tables(300, model, torch.device("cpu"))
    their_cos, their_sin = theirs(torch.zeros(1), torch.arange(300)[None])
    torch.testing.assert_close(cos, their_cos[0], rtol=0, atol=5e-5)
    torch.testing.assert_close(torch.cat([-sin[:, :16], sin[:, 16:]], dim=1), their_sin[0], rtol=0, atol=5e-5)


def test_yarn_keeps_fast_frequencies_and_stretches_slow_ones():
    """By counting turns: a pair that turns more than 32 times stays, one that does not turn once is divided by 8."""
    model = tiny_model("model.head_dim=64", *(f"model.rope_scaling.{own}" for own in
                       ("kind=yarn", "factor=8", "original_length=4096")))  # fmt: skip
    plain = frequencies(tiny_model("model.head_dim=64"), torch.device("cpu"))
    ratio = frequencies(model, torch.device("cpu")) / plain
    turns = 4096 * plain / (2 * math.pi)
    assert ratio[turns > 40].tolist() == pytest.approx([1.0] * int((turns > 40).sum()))
    assert ratio[turns < 0.8].tolist() == pytest.approx([1 / 8] * int((turns < 0.8).sum()))
    between = ratio[(turns > 2) & (turns < 16)]
    assert ((between > 1 / 8) & (between < 1)).all()
    assert model.rope_scaling.query_key_scale == pytest.approx(0.1 * math.log(8) + 1)


def test_scaling_changes_the_model():
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        logits = [
            Decoder(tiny_model("model.rope_theta=500", *fields), 48, seed=0)(tokens)
            for fields in ([], ["model.rope_scaling.kind=linear", "model.rope_scaling.factor=2"])
        ]
    assert not torch.allclose(*logits, atol=1e-4)


def test_rows_that_are_rotated_together_become_neighbours():
    """Two blocks of three rows that are not rotated and six that are: 3 with 6, 4 with 7, 5 with 8."""
    rows = torch.arange(18.0).unsqueeze(1).expand(18, 2)
    order = [0, 1, 2, 3, 6, 4, 7, 5, 8]
    found = neighbours(rows, 2, 6)
    assert found[:, 0].tolist() == order + [9 + row for row in order]
    assert torch.equal(halves(found, 2, 6), rows)
