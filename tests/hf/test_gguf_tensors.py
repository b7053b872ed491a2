"""The tensors and fields of a GGUF file match the transformers export of the same run."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from dynmoe.hf.export import export
from dynmoe.hf.gguf import TYPES, write_gguf
from tests.hf.cases import begin
from tests.hf.gguf_cases import ARCHITECTURES, MODELS, PIECES, SHAPE, of_transformers, read


@pytest.fixture(scope="module")
def made(tmp_path_factory, corpus_dir):
    """Runs and their exports by model name."""
    folder = tmp_path_factory.mktemp("gguf")
    known = {}

    def make(name: str) -> tuple[Path, Path]:
        if name not in known:
            run = begin(corpus_dir, folder / f"run_{len(known)}", [*SHAPE, *MODELS[name]])
            export(run.path, folder / f"out_{len(known)}")
            known[name] = run.path, folder / f"out_{len(known)}"
        return known[name]

    return make


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", MODELS)
def test_tensors_are_those_of_transformers(made, tmp_path, name, kind):
    run, out = made(name)
    architecture = ARCHITECTURES[name]
    done = write_gguf(run, tmp_path / "model.gguf", kind)
    fields, tensors = read(tmp_path / "model.gguf")
    assert fields["general.architecture"] == done.architecture == architecture
    assert fields["general.file_type"] == gguf.LlamaFileType[TYPES[kind]]
    expected = of_transformers(out, architecture)
    assert tensors.keys() == expected.keys()
    assert done.parameters == sum(array.size for array in expected.values())
    for tensor_name, array in expected.items():
        if tensor_name.endswith("inp_shexp.weight") and "with a gate" in name:
            np.testing.assert_array_equal(tensors[tensor_name].data, array[0])
        elif tensor_name.endswith("inp_shexp.weight"):
            check_half(tensors[tensor_name], array)
        else:
            check_values(tensors[tensor_name], array, kind)


def check_half(tensor: gguf.ReaderTensor, zeros: np.ndarray) -> None:
    """The gate is one half in llama.cpp too, which computes the sigmoid as silu(x) / x."""
    assert not zeros.any()
    x_D = torch.randn(zeros.size, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        gate = torch.from_numpy(tensor.data.copy()) @ x_D
        assert torch.nn.functional.silu(gate) / gate == 0.5
        x_D[0] = 0.0  # without the second weight the result would be NaN


def check_values(tensor: gguf.ReaderTensor, expected: np.ndarray, kind: str) -> None:
    exact = kind == "f32" or expected.ndim == 1 or "ffn_gate_inp" in tensor.name
    assert tensor.tensor_type == gguf.GGMLQuantizationType["F32" if exact else kind.upper()], tensor.name
    assert tuple(tensor.shape) == expected.shape[::-1], tensor.name
    found = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(expected.shape)
    if exact:
        np.testing.assert_array_equal(found, expected, tensor.name)
    elif kind == "bf16":
        rounded = torch.from_numpy(expected.copy()).to(torch.bfloat16).float().numpy()
        np.testing.assert_array_equal(found, rounded, tensor.name)
    else:  # half a step, which is an fp16 number: a 127th of the largest of 32 numbers
        blocks = expected.reshape(-1, 32)
        largest = np.abs(blocks).max(axis=1, keepdims=True)
        assert (np.abs(found.reshape(-1, 32) - blocks) <= largest * (0.5 / 127 + 2**-11)).all(), tensor.name


@pytest.mark.parametrize("name", MODELS)
def test_fields_are_those_of_the_configuration(made, tmp_path, name):
    run, out = made(name)
    config = json.loads((out / "config.json").read_text())
    write_gguf(run, tmp_path / "model.gguf")
    fields, _ = read(tmp_path / "model.gguf")
    keys = gguf.Keys
    architecture = ARCHITECTURES[name]
    experts = config.get("num_experts", config.get("num_local_experts"))
    heads = config["num_attention_heads"]
    width = config.get("moe_intermediate_size", config["intermediate_size"])
    expected = {
        keys.LLM.VOCAB_SIZE: PIECES,
        keys.LLM.CONTEXT_LENGTH: config["max_position_embeddings"],
        keys.LLM.BLOCK_COUNT: config["num_hidden_layers"],
        keys.LLM.EMBEDDING_LENGTH: config["hidden_size"],
        keys.LLM.FEED_FORWARD_LENGTH: width,
        keys.Attention.HEAD_COUNT: heads,
        keys.Attention.HEAD_COUNT_KV: heads if architecture in ("olmoe", "dots1") else config["num_key_value_heads"],
        keys.Attention.KEY_LENGTH: config["head_dim"],
        keys.Attention.VALUE_LENGTH: config["head_dim"],
        keys.Attention.LAYERNORM_RMS_EPS: np.float32(config["rms_norm_eps"]),
        keys.Rope.DIMENSION_COUNT: config["head_dim"],
        keys.Rope.FREQ_BASE: config["rope_parameters"]["rope_theta"],
    }
    if experts:
        expected |= {
            keys.LLM.EXPERT_COUNT: experts,
            keys.LLM.EXPERT_USED_COUNT: config["num_experts_per_tok"],
            keys.LLM.EXPERT_FEED_FORWARD_LENGTH: width,
        }
    if architecture in ("qwen2moe", "granitemoe"):
        expected[keys.LLM.EXPERT_SHARED_FEED_FORWARD_LENGTH] = 64 if "shared" in name else width
    if architecture == "granitemoe":
        expected[keys.LLM.LOGIT_SCALE] = 1.0
    if architecture == "dots1":
        expected |= {
            keys.LLM.LEADING_DENSE_BLOCK_COUNT: 0,
            keys.LLM.EXPERT_SHARED_COUNT: 1,
            keys.LLM.EXPERT_WEIGHTS_SCALE: 1.0,
            keys.LLM.EXPERT_GATING_FUNC: gguf.ExpertGatingFuncType.SOFTMAX,
        }
    expected = {key.format(arch=architecture): value for key, value in expected.items()}
    assert {key: value for key, value in fields.items() if key.startswith(architecture)} == expected
