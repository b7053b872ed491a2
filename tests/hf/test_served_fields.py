"""Fields of an export that servers and converters read, and the permissions of its files."""

from __future__ import annotations

import json
import os
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from safetensors.torch import load_file
from sentencepiece import sentencepiece_model_pb2

from dynmoe.data.tokenizer_files import open_tokenizer
from dynmoe.errors import UserError
from dynmoe.hf.command import main
from dynmoe.hf.export import export
from dynmoe.hf.fields import write_rope
from dynmoe.hf.tokenizer import compare, write_tokenizer
from tests.hf.cases import OWN, STANDARD, begin, run_decoder, some_tokens
from tests.hf.test_export import read


@pytest.mark.parametrize("name", [*STANDARD, "top_p"])
def test_servers_find_the_base_of_rotary_positions(corpus_dir, tmp_path, name):
    """mlx-lm reads it at the top level, transformers and vLLM in ``rope_parameters``."""
    from transformers import AutoConfig

    run = begin(corpus_dir, tmp_path / "run", [*(STANDARD | OWN)[name], "model.rope_theta=500"])
    export(run.path, tmp_path / "out")
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert said["rope_theta"] == said["rope_parameters"]["rope_theta"] == 500.0
    read_as = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert read_as.rope_parameters == write_rope(500.0, run.config.model.rope_scaling)
    with torch.no_grad():
        logits = read(tmp_path / "out")(some_tokens()).logits
    torch.testing.assert_close(logits, run_decoder(run.decoder, some_tokens())[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["olmoe", "llama"])
def test_fine_tuning_trains_every_embedding(corpus_dir, tmp_path, name):
    """Without a padding token in its file, OLMoE uses token 1, whose embedding then gets no gradient."""
    export(begin(corpus_dir, tmp_path / "run", STANDARD[name]).path, tmp_path / "out")
    model = read(tmp_path / "out")
    model(torch.tensor([[1, 1, 5]]), labels=torch.tensor([[1, 1, 5]])).loss.backward()
    assert model.model.embed_tokens.weight.grad[1].any()


@pytest.mark.parametrize("name", ["qwen2_moe", "qwen2_moe, shared and dense"])
def test_servers_find_every_tensor_of_qwen2_moe(corpus_dir, tmp_path, name):
    """vLLM creates biases whatever the configuration says, and no server supports a shared expert of width 0."""
    run = begin(corpus_dir, tmp_path / "run", STANDARD[name])
    export(run.path, tmp_path / "out", torch.bfloat16)
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    weights = load_file(tmp_path / "out" / "model.safetensors")
    shared = 16 if "shared" in name else 32
    assert (said["qkv_bias"], said["shared_expert_intermediate_size"]) == (True, shared)
    assert all(tensor.numel() for tensor in weights.values())
    for layer in range(3):
        for part, rows in (("q", 16), ("k", 8), ("v", 8)):
            bias = weights[f"model.layers.{layer}.self_attn.{part}_proj.bias"]
            assert torch.equal(bias, torch.zeros(rows, dtype=torch.bfloat16))
    assert weights["model.layers.0.mlp.shared_expert.up_proj.weight"].shape == (shared, 16)
    assert bool(weights["model.layers.0.mlp.shared_expert.up_proj.weight"].any()) == ("shared" in name)
    assert not weights["model.layers.0.mlp.shared_expert_gate.weight"].any()


def test_the_tokenizer_states_what_it_prepends_for_llama_cpp(corpus_dir, tmp_path):
    """llama.cpp's converter assumes a token and a space by default; the fields match sentencepiece instead."""
    from transformers import AutoTokenizer

    export(begin(corpus_dir, tmp_path / "run", []).path, tmp_path / "out")
    said = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert (said["add_bos_token"], said["add_prefix_space"]) == (False, False)
    model = sentencepiece_model_pb2.ModelProto.FromString((tmp_path / "out" / "tokenizer.model").read_bytes())
    model.normalizer_spec.add_dummy_prefix = True
    (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
    own = open_tokenizer(tmp_path / "tokenizer.model")
    write_tokenizer(own, tmp_path, {"max_position_embeddings": 64})
    said = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (said["add_bos_token"], said["add_prefix_space"]) == (False, True)
    texts = ("the quick", " the", "", "a\n b")
    if Version(metadata.version("transformers")) >= Version("5.24"):
        for text in texts:
            assert AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == own.encode(text)
    else:  # older versions omit the space, and an export with other ids is refused
        with pytest.raises(UserError, match="ids differ between transformers and sentencepiece from token 0"):
            compare(own, tmp_path, texts, cure="use a later one")


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_every_file_has_the_mode_that_the_umask_allows(corpus_dir, tmp_path, umask):
    """safetensors itself writes private files."""
    before = os.umask(umask)
    try:
        run = begin(corpus_dir, tmp_path / "run", ["model.moe.experts=3"])
        export(run.path, tmp_path / "out")
    finally:
        os.umask(before)
    assert {"model.safetensors", "dense.safetensors", "tokenizer.json"} < {path.name for path in tmp_path.rglob("*")}
    assert not_of_mode(tmp_path, 0o666 & ~umask) == set()


def test_training_writes_no_private_file(undisturbed):
    """Includes checkpoints, traces and TensorBoard events."""
    folder = undisturbed[0]
    (folder / "new").touch()
    mode = (folder / "new").stat().st_mode & 0o777
    (folder / "new").unlink()
    assert not_of_mode(folder, mode) == set()


def not_of_mode(folder: Path, mode: int) -> set[str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.name for path in files if path.stat().st_mode & 0o777 != mode}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("llama", "transformers, vLLM and mlx-lm can load it; for llama.cpp use python -m dynmoe.hf gguf."),
        ("qwen2_moe", "transformers, vLLM and mlx-lm can load it; for llama.cpp use python -m dynmoe.hf gguf."),
        ("qwen2_moe, shared and dense", "mlx-lm and llama.cpp cannot, because not every layer has experts."),
        ("qwen2_moe, sum", "mlx-lm does not normalize its gates; for llama.cpp use"),
        ("top_p", "transformers and vLLM can load it; mlx-lm and llama.cpp cannot."),
    ],
)
def test_the_export_prints_which_servers_can_load_it(corpus_dir, tmp_path, monkeypatch, capsys, name, said):
    """tests/served measures whether these sentences are true."""
    sum_to_1 = [*STANDARD["qwen2_moe"], "model.moe.shared_hidden=16", "model.router.renormalize=true"]
    begin(corpus_dir, tmp_path / "run", (STANDARD | OWN | {"qwen2_moe, sum": sum_to_1})[name])
    monkeypatch.setattr("sys.argv", ["dynmoe.hf", "export", str(tmp_path / "run"), str(tmp_path / "out")])
    main()
    last = capsys.readouterr().out.splitlines()[-1]
    assert said in last
    assert last.endswith("How to serve it: docs/serving.md")
