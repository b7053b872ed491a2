"""Exports of older versions (see tests/golden) load in transformers with their own code, and can be imported."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from dynmoe.config import load_config
from dynmoe.hf.routers import read_router
from tests.hf.cases import OWN, run_decoder
from tests.hf.test_export import read
from tests.hf.test_import import imported
from tests.routing.test_golden import GOLDEN

OLDER = ["export_top_p", "export_top_any"]

OLDER_ROUTERS = json.loads((GOLDEN / "older_routers.json").read_text())


@pytest.mark.parametrize("name", OLDER)
def test_transformers_gives_the_original_results(name):
    expected = load_file(GOLDEN / name / "expected.safetensors")
    with torch.no_grad():
        found = read(GOLDEN / name)(expected["input_ids"], output_router_logits=True)
    torch.testing.assert_close(found.logits, expected["logits"], rtol=0, atol=1e-5)
    torch.testing.assert_close(found.aux_loss, expected["aux_loss"])
    assert torch.equal(found.experts_per_token, expected["experts_per_token"])


@pytest.mark.parametrize("field", ["num_experts", "layer_experts"])
@pytest.mark.parametrize("name", OLDER)
def test_older_exports_can_be_imported(name, field, tmp_path):
    source = shutil.copytree(GOLDEN / name, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config[field] = config.pop("num_experts")
    (source / "config.json").write_text(json.dumps(config))
    expected = load_file(source / "expected.safetensors")
    architecture, decoder = imported(source, tmp_path / "run")
    assert architecture == "dynmoe"
    logits, maps = run_decoder(decoder, expected["input_ids"])
    torch.testing.assert_close(logits, expected["logits"], rtol=0, atol=1e-5)
    assert torch.equal(torch.stack([routed.sum(dim=-1) for routed in maps]), expected["experts_per_token"])


@pytest.mark.parametrize("name", OLDER_ROUTERS)
def test_the_settings_of_every_router_are_read_as_they_were_meant(name):
    sizes = ["model.hidden=16", "model.heads=2", "model.kv_heads=1", "model.moe.experts=4"]
    expected = load_config(None, [*sizes, *OWN[name]])
    fields = read_router(OLDER_ROUTERS[name], hidden=16)
    found = load_config(None, [*sizes, *(f"{field}={json.dumps(value)}" for field, value in fields.items())])
    assert dataclasses.asdict(found.model.router.resolved) == dataclasses.asdict(expected.model.router.resolved)
    assert found.budget == expected.budget
