"""Models that llama.cpp supports, and the expected contents of their files according to transformers and gguf."""

from __future__ import annotations

import json
import re
from pathlib import Path

import gguf
import numpy as np
from safetensors.torch import load_file

from tests.hf.cases import TOP_K

# Row lengths are multiples of q8_0's block; 48 embedding rows represent no piece.
SHAPE = ["model.hidden=64", "model.heads=4", "model.kv_heads=2", "model.ffn_hidden=96", "model.moe.expert_hidden=32"]
RENORMALIZED = "model.router.renormalize=true"
MODELS = {
    "llama": ["model.moe.experts=0", "model.head_dim=24", "model.rope_theta=5000"],
    "llama, tied": ["model.moe.experts=0", "model.tie_embeddings=true"],
    "mixtral": [*TOP_K, RENORMALIZED],
    "olmoe": [*TOP_K, "model.qk_norm=projection", "model.norm_eps=1e-6"],
    "olmoe, tied": [*TOP_K, "model.qk_norm=projection", "model.kv_heads=4", "model.tie_embeddings=true"],
    "qwen2_moe": TOP_K,
    "qwen2_moe, shared": [*TOP_K, "model.moe.shared_hidden=64"],
    "qwen2_moe, shared with a gate": [*TOP_K, "model.moe.shared_hidden=64", "model.moe.shared_gate=true"],
    "qwen2_moe, shared and renormalized": [*TOP_K, RENORMALIZED, "model.moe.shared_hidden=64", "model.head_dim=24"],
    "qwen3_moe": [*TOP_K, "model.qk_norm=head", "model.tie_embeddings=true"],
    "qwen3_moe, renormalized": [
        *TOP_K, RENORMALIZED, "model.qk_norm=head", "model.head_dim=24", "model.tie_embeddings=true",
    ],
}  # fmt: skip
ARCHITECTURES = dict(zip(MODELS, ["llama", "llama", "llama", "olmoe", "olmoe", "qwen2moe", "qwen2moe", "qwen2moe",
                                  "granitemoe", "dots1", "qwen3moe"], strict=True))  # fmt: skip
PIECES = 400


def read(path: Path) -> tuple[dict[str, object], dict[str, gguf.ReaderTensor]]:
    """Reads fields and tensors with the package gguf."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    return fields, {tensor.name: tensor for tensor in reader.tensors}


def of_transformers(out: Path, architecture: str) -> dict[str, np.ndarray]:
    """The tensors of an export under the names that the package gguf assigns, with stacked experts."""
    config = json.loads((out / "config.json").read_text())
    (arch,) = [arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture]
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    stacks: dict[str, dict[int, np.ndarray]] = {}
    for name, tensor in load_file(out / "model.safetensors").items():
        if tensor.numel() == 0 or (name.endswith("bias") and not tensor.any()):
            continue  # an empty shared expert, or zero biases
        whole = re.sub(r"\.experts\.\d+\.", ".experts.", name)
        expert = re.search(r"\.experts\.(\d+)\.", name)
        translated = names.get_name(whole, try_suffixes=(".weight",))
        if translated is None:
            assert architecture == "granitemoe", name
            assert name.endswith("shared_expert_gate.weight"), name
            continue
        stacks.setdefault(translated, {})[int(expert[1]) if expert else 0] = tensor.numpy()
    found = {}
    for name, parts in stacks.items():
        found[name] = np.stack([parts[n] for n in range(len(parts))]) if "_exps" in name else parts[0]
    grouped = {"olmoe": ("attn_k", "attn_v", "attn_k_norm"), "dots1": ("attn_k", "attn_v")}
    heads = config["num_attention_heads"]
    groups = config["num_key_value_heads"]
    width = config["head_dim"]
    for name, array in found.items():
        _, _, part = name.removesuffix(".weight").rpartition(".")
        if part in ("token_embd", "output"):
            found[name] = array[:PIECES]
        elif architecture in ("llama", "granitemoe") and part in ("attn_q", "attn_k"):
            found[name] = array[interleaved_order(len(array), width)]
        elif part in grouped.get(architecture, ()):
            each = [head // (heads // groups) for head in range(heads)]
            found[name] = np.concatenate([array[group * width : (group + 1) * width] for group in each])
        elif architecture == "granitemoe" and part == "ffn_down_shexp":
            found[name] = array / 2  # the gate halves it in transformers
    add_required(found, architecture, config["num_hidden_layers"])
    return found


def add_required(found: dict[str, np.ndarray], architecture: str, layers: int) -> None:
    """Adds tensors that llama.cpp's architecture requires and transformers does not have."""
    if architecture in ("olmoe", "qwen2moe", "dots1"):  # which have a separate output matrix
        found.setdefault("output.weight", found["token_embd.weight"])
    if architecture in ("qwen2moe", "dots1"):  # which have a shared expert
        for layer in range(layers):
            for name in ("gate", "up", "down"):
                shape = found[f"blk.{layer}.ffn_{name}_exps.weight"].shape[1:]
                found.setdefault(f"blk.{layer}.ffn_{name}_shexp.weight", np.zeros(shape, np.float32))


def interleaved_order(rows: int, width: int) -> list[int]:
    """Row order of llama: it rotates rows 2i and 2i + 1 together, transformers rows i and i + width / 2."""
    order = [0] * rows
    for head in range(0, rows, width):
        for pair in range(width // 2):
            order[head + 2 * pair] = head + pair
            order[head + 2 * pair + 1] = head + pair + width // 2
    return order
