"""The command that writes GGUF files, and the models that it refuses."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import gguf
import pytest

from dynmoe.data.sentencepiece_tokenizer import TOKENIZER_MODEL
from dynmoe.errors import UserError
from dynmoe.hf import main
from dynmoe.hf.gguf import _check_router_state, write_gguf
from dynmoe.trained import open_decoder
from tests.hf.cases import OWN, TOP_K, begin
from tests.hf.gguf_cases import MODELS, RENORMALIZED, SHAPE, read


@pytest.fixture(scope="module")
def run(tmp_path_factory, corpus_dir) -> Path:
    """A run that llama.cpp supports."""
    return begin(corpus_dir, tmp_path_factory.mktemp("gguf") / "run", [*SHAPE, *MODELS["olmoe"]]).path


def test_a_megatron_run_gives_the_same_file(corpus_dir, tmp_path):
    for engine in ("deepspeed", "megatron"):
        run = begin(corpus_dir, tmp_path / engine, [*SHAPE, *MODELS["qwen2_moe, shared"], f"engine={engine}"])
        write_gguf(run.path, tmp_path / f"{engine}.gguf", "bf16")
    assert (tmp_path / "deepspeed.gguf").read_bytes() == (tmp_path / "megatron.gguf").read_bytes()


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "llama"])
def test_layers_that_predict_further_tokens_are_left_out(corpus_dir, tmp_path, name):
    files = []
    for layers in (0, 1):
        run = begin(corpus_dir, tmp_path / f"run_{layers}", [*SHAPE, *MODELS[name], f"model.mtp.layers={layers}"])
        write_gguf(run.path, tmp_path / f"{layers}.gguf")
        fields, tensors = read(tmp_path / f"{layers}.gguf")
        files.append((fields, {name: tensor.shape.tolist() for name, tensor in tensors.items()}))
    assert files[0] == files[1]


REFUSED = {
    "model.router.kind='top_p'.*same number of experts.*transformers or vLLM": OWN["top_p"],
    "model.router.kind='null_experts'": OWN["null_experts"],
    "model.moe.moe_layer_freq=2.*experts in every layer": [*TOP_K, "model.moe.moe_layer_freq=2"],
    "model.moe.experts_by_layer=.*same number of experts in every": [*TOP_K, "model.moe.experts_by_layer=[4,4,3]"],
    "model.moe.first_k_dense_replace=1.*experts in every layer": [*TOP_K, "model.moe.first_k_dense_replace=1"],
    "model.moe.shared_gate=True.*granitemoe has no gate": [
        *TOP_K, RENORMALIZED, "model.moe.shared_hidden=32", "model.moe.shared_gate=true",
    ],
    "model.router.score_function='sigmoid'.*no counterpart": [*TOP_K, "model.router.score_function=sigmoid"],
    "model.router.n_group=2.*no counterpart": [*TOP_K, "model.router.n_group=2"],
    "model.router.gate_scale=2.5.*no counterpart": [*TOP_K, "model.router.gate_scale=2.5"],
    "model.router.renormalize=True.*olmoe does not normalize": [*TOP_K, RENORMALIZED, "model.qk_norm=projection"],
    "model.head_dim=24: must be model.hidden / model.heads .*qwen2moe": [*TOP_K, "model.head_dim=24"],
    "model.qk_norm='head'.*no experts": ["model.moe.experts=0", "model.qk_norm=head"],
    "model.moe.first_k_dense_replace=1: llama.cpp requires experts": [
        *TOP_K, "model.moe.first_k_dense_replace=1", "model.mtp.layers=1",
    ],
    "layer 0: has biases of loss-free balancing": TOP_K,
}  # fmt: skip


@pytest.mark.parametrize("problem", REFUSED)
def test_models_that_llama_cpp_does_not_support_are_refused(corpus_dir, tmp_path, problem):
    name = "biased" if "balancing" in problem else "run"
    run = begin(corpus_dir, tmp_path / name, [*SHAPE, *REFUSED[problem]])
    refused(run.path, tmp_path / "out" / "model.gguf", problem)
    assert not (tmp_path / "out").exists()


def refused(run: Path, output: Path, problem: str, kind: str = "f32") -> None:
    with pytest.raises(UserError, match=problem) as error:
        write_gguf(run, output, kind)
    assert "\n" not in str(error.value)


def test_inactive_experts_are_named(corpus_dir, tmp_path):
    model = open_decoder(begin(corpus_dir, tmp_path / "run", [*SHAPE, *TOP_K]).path)
    _check_router_state(model)
    model.decoder.moe_layers[1].router.active_E[2] = False
    with pytest.raises(UserError, match=r"layer 1: experts \[2\] are inactive.*dynmoe\.compact"):
        _check_router_state(model)


@pytest.mark.parametrize(("overrides", "problem"), [
    (["model.hidden=48"], r"model\.hidden=48: q8_0 packs 32 numbers of a row"),
    (["model.moe.expert_hidden=24"], r"model\.moe\.expert_hidden=24: q8_0"),
    (["model.moe.shared_hidden=16"], r"model\.moe\.shared_hidden=16: q8_0"),
    (["model.moe.experts=0", "model.ffn_hidden=40"], r"model\.ffn_hidden=40: q8_0"),
    (["model.moe.experts=0", "model.head_dim=12"],
     r"model\.head_dim=12: q8_0 .*, and 48 is not a multiple of 32; use --type"),
])  # fmt: skip
def test_rows_that_q8_0_cannot_pack_are_named(corpus_dir, tmp_path, overrides, problem):
    run = begin(corpus_dir, tmp_path / "run", [*SHAPE, *TOP_K, *overrides])
    refused(run.path, tmp_path / "model.gguf", problem, "q8_0")
    assert write_gguf(run.path, tmp_path / "model.gguf", "bf16").size > 0


def test_a_failure_leaves_no_file(run, tmp_path, monkeypatch):
    output = tmp_path / "model.gguf"
    refused(run, output, "--type q4_0: must be one of f32, bf16, q8_0; .* llama.cpp's llama-quantize", "q4_0")
    (tmp_path / "file").write_text("")
    refused(run, tmp_path / "file" / "model.gguf", "file/model.gguf cannot be written: .*name another place")
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / TOKENIZER_MODEL).unlink()
    refused(tmp_path / "run", output, f"{TOKENIZER_MODEL} is missing")
    with monkeypatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
        refused(run, output, "model.gguf cannot be written: .*No space left")
        patch.setitem(sys.modules, "gguf", None)
        refused(run, output, r"gguf: .*pip install 'dynmoe\[gguf\]'")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "run"]
    output.write_text("mine")
    refused(run, output, "model.gguf exists; name a new file")
    assert output.read_text() == "mine"


def full(*arguments: object) -> None:
    raise OSError(28, "No space left on device")


def test_the_command_prints_what_it_wrote(run, tmp_path, monkeypatch, capsys):
    output = tmp_path / "new" / "model.gguf"
    monkeypatch.setattr(sys, "argv", ["dynmoe.hf", "gguf", str(run), str(output), "--type", "q8_0"])
    main()
    size = f"{output.stat().st_size / 1e6:.1f} MB (q8_0), as llama.cpp's olmoe"
    assert size in capsys.readouterr().out
    assert [path.name for path in output.parent.iterdir()] == ["model.gguf"]
