"""Models that llama.cpp can be, and what a file of one should hold by transformers and GGUF's own package."""

from __future__ import annotations

import json
import re
from pathlib import Path

import gguf
import numpy as np
from safetensors.torch import load_file

from tests.hf.cases import TOP_K

# Rows of q8_0's whole blocks, and 48 rows of the embedding that stand for no piece.
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
    "qwen2_moe, shared and renormalized": [*TOP_K, RENORMALIZED, "model.moe.shared_hidden=64", "model.head_dim=24"],
    "qwen3_moe": [*TOP_K, "model.qk_norm=head", "model.tie_embeddings=true"],
    "qwen3_moe, renormalized": [
        *TOP_K, RENORMALIZED, "model.qk_norm=head", "model.head_dim=24", "model.tie_embeddings=true",
    ],
}  # fmt: skip
ARCHITECTURES = dict(zip(MODELS, ["llama", "llama", "llama", "olmoe", "olmoe", "qwen2moe", "qwen2moe", "granitemoe",
                                  "dots1", "qwen3moe"], strict=True))  # fmt: skip
PIECES = 400


def read(path: Path) -> tuple[dict[str, object], dict[str, gguf.ReaderTensor]]:
    """Fields and tensors, as GGUF's own package finds them."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    return fields, {tensor.name: tensor for tensor in reader.tensors}


def of_transformers(out: Path, architecture: str) -> dict[str, np.ndarray]:
    """The tensors of an export by the names that GGUF's package translates them to, experts above each other."""
    config = json.loads((out / "config.json").read_text())
    (arch,) = [arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture]
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    stacks: dict[str, dict[int, np.ndarray]] = {}
    for name, tensor in load_file(out / "model.safetensors").items():
        if tensor.numel() == 0 or (name.endswith("bias") and not tensor.any()):
            continue  # a shared expert that is none; biases that add nothing
        whole, expert = re.sub(r"\.experts\.\d+\.", ".experts.", name), re.search(r"\.experts\.(\d+)\.", name)
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
    heads, groups, width = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    for name, array in found.items():
        _, _, part = name.removesuffix(".weight").rpartition(".")
        if part in ("token_embd", "output"):
            found[name] = array[:PIECES]
        elif architecture in ("llama", "granitemoe") and part in ("attn_q", "attn_k"):
            found[name] = array[turned_together(len(array), width)]
        elif part in grouped.get(architecture, ()):
            each = [head // (heads // groups) for head in range(heads)]
            found[name] = np.concatenate([array[group * width : (group + 1) * width] for group in each])
        elif architecture == "granitemoe" and part == "ffn_down_shexp":
            found[name] = array / 2  # transformers halves it by a gate
    add_what_must_be(found, architecture, config["num_hidden_layers"])
    return found


def add_what_must_be(found: dict[str, np.ndarray], architecture: str, layers: int) -> None:
    """What transformers does without and an architecture of llama.cpp does not."""
    if architecture in ("olmoe", "qwen2moe", "dots1"):  # which have an output of their own
        found.setdefault("output.weight", found["token_embd.weight"])
    if architecture in ("qwen2moe", "dots1"):  # and a shared expert
        for layer in range(layers):
            for name in ("gate", "up", "down"):
                shape = found[f"blk.{layer}.ffn_{name}_exps.weight"].shape[1:]
                found.setdefault(f"blk.{layer}.ffn_{name}_shexp.weight", np.zeros(shape, np.float32))


def turned_together(rows: int, width: int) -> list[int]:
    """Rows of transformers in llama's order: there row i of a head turns with i + width / 2, here 2i with 2i + 1."""
    order = [0] * rows
    for head in range(0, rows, width):
        for pair in range(width // 2):
            order[head + 2 * pair] = head + pair
            order[head + 2 * pair + 1] = head + pair + width // 2
    return order
