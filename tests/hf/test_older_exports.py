"""Exports of older code (see tests/golden) are read by transformers, with their own code."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from tests.hf.test_export import read
from tests.routing.test_golden import GOLDEN

OLDER = ["export_top_p", "export_top_any"]


@pytest.mark.parametrize("name", OLDER)
def test_transformers_computes_what_it_did(name):
    expected = load_file(GOLDEN / name / "expected.safetensors")
    with torch.no_grad():
        found = read(GOLDEN / name)(expected["input_ids"], output_router_logits=True)
    torch.testing.assert_close(found.logits, expected["logits"], rtol=0, atol=1e-5)
    torch.testing.assert_close(found.aux_loss, expected["aux_loss"])
    assert torch.equal(found.experts_per_token, expected["experts_per_token"])
