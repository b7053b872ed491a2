"""Both families with latent attention, from a run to transformers and back, and in training."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from dynmoe.config import load_config
from dynmoe.hf.export import export
from dynmoe.hf.importing import import_checkpoint
from tests.hf import test_deepseek_v3, test_longcat
from tests.hf.cases import begin, train_run, twenty_steps
from tests.hf.test_import import imported

FAMILIES = {"deepseek_v3": test_deepseek_v3, "longcat_flash": test_longcat}
ROUTERS = {"deepseek_v3": ("gate", "gate.weight"), "longcat_flash": ("router", "router.classifier.weight")}


@pytest.mark.parametrize(("family", "name"), [(family, name) for family, own in FAMILIES.items() for name in own.RUNS])
def test_a_run_is_exported_and_imported_again(corpus_dir, tmp_path, family, name):
    from transformers import AutoModelForCausalLM

    begun = begin(corpus_dir, tmp_path / "run_biased", FAMILIES[family].RUNS[name])
    biases = [buffer for key, buffer in begun.decoder.named_buffers() if ".router.bias_" in key]
    assert len(biases) == len(begun.decoder.moe_layers)
    assert all(bias.any() for bias in biases)
    assert export(begun.path, tmp_path / "out").architecture == family
    assert not list((tmp_path / "out").glob("*.py"))
    model, found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(found.values()), found
    FAMILIES[family].compare(begun.decoder, model.eval())
    _, again = imported(tmp_path / "out", tmp_path / "again")
    factors = [
        own.model.rope_scaling.attention_factor for own in (begun.config, load_config(tmp_path / "again/config.yaml"))
    ]
    assert factors[1] == (None if factors[0] is None else pytest.approx(factors[0])), (
        "stretched further, it would differ"
    )
    state = begun.decoder.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in again.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_selection_biases_keep_fp32_in_bf16(corpus_dir, tmp_path, family):
    begun = begin(corpus_dir, tmp_path / "run_biased", FAMILIES[family].OURS)
    export(begun.path, tmp_path / "out", torch.bfloat16)
    kinds = {name: value.dtype for name, value in load_file(tmp_path / "out" / "model.safetensors").items()}
    router, weight = ROUTERS[family]
    assert kinds[f"model.layers.1.mlp.{router}.e_score_correction_bias"] == torch.float32
    assert kinds[f"model.layers.1.mlp.{weight}"] == torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize(("family", "engine"), [
    ("deepseek_v3", ["parallel.expert=2"]),
    ("deepseek_v3", ["engine=megatron", "parallel.tensor=2"]),
    ("longcat_flash", ["parallel.expert=2"]),
    ("longcat_flash", ["engine=megatron", "parallel.pipeline=2"]),
    ("longcat_flash", ["engine=megatron", "parallel.tensor=2", "train.recompute=full"]),
], ids=lambda value: value if isinstance(value, str) else " ".join(value))  # fmt: skip
def test_training_starts_from_the_imported_weights(corpus_dir, tmp_path, family, engine):
    """In either engine the first loss is that of transformers, and the loss decreases."""
    model = FAMILIES[family].checkpoint(tmp_path / "source", vocab_size=448)
    run = tmp_path / "run"
    import_checkpoint(tmp_path / "source", run, [*twenty_steps(corpus_dir), *engine])
    rows, batch = train_run(run, corpus_dir, tmp_path, 2)
    with torch.no_grad():
        logits = model(batch.tokens_BS).logits
    first = F.cross_entropy(logits.flatten(0, 1), batch.labels_BS.flatten()).item()
    assert math.isfinite(first)
    assert rows[0]["train/lm_loss"] == pytest.approx(first, rel=1e-5)
    assert rows[-1]["train/lm_loss"] < first - 0.5
