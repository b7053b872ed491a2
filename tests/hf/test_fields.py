"""For any ``config.json``, the imported model gives the logits of transformers, or the field is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from dynmoe.config import load_config
from dynmoe.errors import UserError
from dynmoe.hf.deepseek_v3 import is_interleaved
from dynmoe.hf.fields import FAMILIES, FIXED, IGNORED, KEPT, check_fields
from dynmoe.hf.formats import from_transformers
from dynmoe.hf.tensors import Tensors
from dynmoe.hf.weights import load_weights
from dynmoe.model import Decoder
from tests.hf.cases import run_decoder, some_tokens
from tests.hf.test_import import RELEASED

COMMON = {
    "vocab_size": 96, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1,
    "hidden_act": "silu", "max_position_embeddings": 64, "initializer_range": 0.3, "rms_norm_eps": 1e-5,
    "rope_theta": 500.0, "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float32",
    "transformers_version": "4.40.0", "use_cache": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
}  # fmt: skip
TOP_K = {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.01, "output_router_logits": False}
# The configurations of published models, made small.
BASES = {
    "llama": {"intermediate_size": 32, "pretraining_tp": 1, "attention_bias": False, "attention_dropout": 0.0},
    # Transformers' YaRN does not build a Mixtral without head_dim.
    "mixtral": {"intermediate_size": 24, "num_local_experts": 8, "sliding_window": None, "head_dim": 8, **TOP_K},
    "olmoe": {"intermediate_size": 24, "num_experts": 8, "norm_topk_prob": False, "clip_qkv": None, **TOP_K},
    "qwen3_moe": {
        "intermediate_size": 32, "moe_intermediate_size": 24, "num_experts": 8, "norm_topk_prob": True, "head_dim": 8,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "max_window_layers": 3, "sliding_window": None,
        "use_sliding_window": False, **TOP_K,
    },
    "qwen2_moe": {
        "intermediate_size": 32, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 16, "num_experts": 8,
        "norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": [], "max_window_layers": 3,
        "sliding_window": 64, "use_sliding_window": False, "qkv_bias": True, **TOP_K,
    },
    "deepseek_v3": {
        "intermediate_size": 32, "moe_intermediate_size": 24, "num_hidden_layers": 4, "num_key_value_heads": None,
        "q_lora_rank": 14, "kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 8, "v_head_dim": 10,
        "rope_interleave": True, "rms_norm_eps": 1e-6, "attention_bias": False, "attention_dropout": 0.0,
        "n_routed_experts": 16, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
        "n_group": 8, "topk_group": 4, "norm_topk_prob": True, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
        "topk_method": "noaux_tc", "aux_loss_alpha": 0.001, "seq_aux": True, "ep_size": 1, "moe_layer_freq": 1,
        "num_nextn_predict_layers": 1, "pretraining_tp": 1,
    },
    "longcat_flash": {
        "num_layers": 2, "num_key_value_heads": None, "ffn_hidden_size": 32,
        "expert_ffn_hidden_size": 24, "q_lora_rank": 14, "kv_lora_rank": 12, "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 8, "head_dim": 8, "v_head_dim": 10, "attention_bias": False, "attention_dropout": 0.0,
        "attention_method": "MLA", "mla_scale_q_lora": True, "mla_scale_kv_lora": True, "n_routed_experts": 8,
        "zero_expert_num": 4, "zero_expert_type": "identity", "moe_topk": 3, "routed_scaling_factor": 6.0,
        "router_bias": False,
    },
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
EQUAL = YARN | {"type": "yarn", "mscale": 0.7, "mscale_all_dim": 0.7}
SWITCHED = [{"use_sliding_window": True, "sliding_window": 3}]
MIXED = [
    {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2},
    {"use_sliding_window": True, "sliding_window": 5, "layer_types": ["full_attention", *["sliding_attention"] * 2]},
]
# What must be supported, like SCALED.
BIASED = [{"attention_bias": True}]
SUPPORTED = {
    "llama": BIASED, "mixtral": [{"sliding_window": 4}], "olmoe": BIASED, "qwen3_moe": [*SWITCHED, *BIASED],
    "qwen2_moe": [*SWITCHED, *MIXED],
    "deepseek_v3": [{"rope_scaling": EQUAL}, {"q_lora_rank": None}, {"rope_interleave": False}, {"n_group": 4}],
    "longcat_flash": [{"rope_scaling": EQUAL}, {"num_layers": 3}, {"zero_expert_num": 2}, {"moe_topk": 4}],
}  # fmt: skip
SCALED = (YARN, LLAMA3, {"type": "linear", "factor": 2.0}, YARN | {"mscale": 0.7, "mscale_all_dim": 1.2})
# Latent attention has one factor for all of a query and key.
SCALED_LATENT = (LLAMA3, {"type": "linear", "factor": 2.0}, EQUAL)
# A different value for every field of the configuration classes.
OTHER = {
    "transformers_version": "5.1.0", "architectures": ["OtherForCausalLM"], "output_hidden_states": True,
    "return_dict": False, "dtype": "bfloat16", "chunk_size_feed_forward": 4, "is_encoder_decoder": True,
    "id2label": {"0": "a"}, "label2id": {"a": 0}, "problem_type": "regression", "vocab_size": 128, "hidden_size": 32,
    "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "hidden_act": "gelu", "max_position_embeddings": 16, "initializer_range": 0.2, "rms_norm_eps": 0.1,
    "use_cache": False, "pad_token_id": 3, "bos_token_id": 5, "eos_token_id": [6, 7], "pretraining_tp": 2,
    "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 90.0},
    "attention_bias": True, "attention_dropout": 0.5, "mlp_bias": True, "head_dim": 12, "sliding_window": 4,
    "num_experts_per_tok": 3, "num_local_experts": 4, "num_experts": 4, "output_router_logits": True,
    "router_aux_loss_coef": 0.5, "router_jitter_noise": 0.5, "clip_qkv": 0.1, "norm_topk_prob": None,
    "use_sliding_window": True, "decoder_sparse_step": 2, "moe_intermediate_size": 32, "mlp_only_layers": [1],
    "shared_expert_intermediate_size": 24, "qkv_bias": False, "max_window_layers": 1,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    "n_shared_experts": 2, "n_routed_experts": 32, "routed_scaling_factor": 1.5, "kv_lora_rank": 16,
    "q_lora_rank": None, "qk_rope_head_dim": 4, "v_head_dim": 8, "qk_nope_head_dim": 12, "n_group": 4, "topk_group": 2,
    "first_k_dense_replace": 2, "rope_interleave": False, "num_mtp_layers": 0,
    "num_layers": 3, "ffn_hidden_size": 40, "expert_ffn_hidden_size": 32, "qk_head_dim": 16, "moe_topk": 4,
    "zero_expert_num": 2,
}  # fmt: skip
# Fields outside of the classes that transformers obeys anyway, or that older files contain.
FURTHER = [
    {"rope_theta": 90.0}, {"rope_scaling": YARN}, {"rope_scaling": LLAMA3}, {"rope_parameters": YARN},
    {"rope_scaling": {"type": "linear", "factor": 2.0}}, {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 1.2}}, {"rope_scaling": YARN | {"mscale": 0.7}},
    {"rope_scaling": EQUAL}, {"rope_scaling": YARN | {"mscale_all_dim": 0.7}},
    {"rope_scaling": YARN | {"attention_factor": 1.0, "mscale_all_dim": 0.7}},
    {"rope_scaling": YARN | {"attention_factor": 1.3, "truncate": False}},
    {"rope_parameters": YARN | {"beta_fast": 4.0, "beta_slow": 0.5, "rope_theta": 70.0}},
    {"rope_parameters": LLAMA3 | {"partial_rotary_factor": 0.5}},
    {"rope_parameters": LLAMA3 | {"low_freq_factor": 0.5}},
    {"rope_scaling": YARN, "rope_parameters": {"rope_type": "default", "rope_theta": 90.0}},
    {"rope_scaling": {"rope_type": "default"}, "rope_parameters": YARN},
    {"rope_scaling": {"rope_type": "default"}, "rope_parameters": {"rope_type": "default", "rope_theta": 90.0}},
    {"rope_scaling": {"rope_type": "default", "rope_theta": 70.0}},
    {"partial_rotary_factor": 0.5}, {"is_causal": False}, {"sliding_window": 4}, {"qkv_bias": True},
    {"layer_types": ["full_attention"] * 3}, {"transformers_weights": "other.safetensors"},
    {"quantization_config": {"quant_method": "fp8"}},
    {"auto_map": {"AutoModelForCausalLM": "modeling_other.OtherForCausalLM"}}, {"torch_dtype": "bfloat16"},
    {"_attn_implementation": "eager"}, {"_name_or_path": "somebody/something"}, {"temperature": 0.5, "top_k": 7},
    *SWITCHED, *MIXED, {"use_sliding_window": True, "sliding_window": 50},
    {"attn_implementation": "eager"}, {"rope_interleaved": True}, {"num_experts": 4, "num_local_experts": 4},
]  # fmt: skip
SHAPES = {
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_experts",
    "num_local_experts", "moe_intermediate_size", "shared_expert_intermediate_size", "n_routed_experts",
    "n_shared_experts", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
    "num_layers", "ffn_hidden_size", "expert_ffn_hidden_size", "zero_expert_num",
}  # fmt: skip
# Fields that cannot have the value in OTHER, or be missing: transformers computes no such model.
FROZEN = {"longcat_flash": {"q_lora_rank", "qk_rope_head_dim", "head_dim"}}


def settings_of(family: str) -> dict:
    settings = {"model_type": family, "architectures": [FAMILIES[family].model_class]} | COMMON | BASES[family]
    if "num_layers" in settings:
        del settings["num_hidden_layers"]
    return settings


def fields_of(family: str) -> list[str]:
    import transformers

    return [spec.name for spec in dataclasses.fields(getattr(transformers, FAMILIES[family].configuration))]


def weights_of(model) -> dict[str, torch.Tensor]:
    """Parameters and selection biases."""
    biases = {name: value for name, value in model.named_buffers() if name.endswith("e_score_correction_bias")}
    return dict(model.named_parameters()) | biases


class Checkpoint:
    """Weights initialized and saved by transformers; other settings get new ones only if the shapes differ."""

    def __init__(self, settings: dict, folder: Path) -> None:
        self.folder = folder
        self.weights = weights_of(self._model(settings, folder))
        self._ours: dict[tuple[str, ...], torch.Tensor] = {}

    @staticmethod
    def _model(settings: dict, folder: Path):
        """The model that transformers creates from a file with ``settings``."""
        from transformers import AutoConfig, AutoModelForCausalLM

        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(settings))
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32).eval()
        torch.manual_seed(0)
        for weight in weights_of(model).values():
            torch.nn.init.normal_(weight, std=0.3)
        if settings["model_type"] == "qwen2_moe":  # as in an export
            for name, parameter in model.named_parameters():
                if name.endswith(("_proj.bias", "shared_expert_gate.weight")):
                    torch.nn.init.zeros_(parameter)
        if not (folder / "model.safetensors").exists():
            model.save_pretrained(folder)
        return model

    @torch.no_grad()
    def logits(self, settings: dict) -> tuple[torch.Tensor, Path]:
        """The logits of transformers with these settings, and the folder of the weights."""
        from transformers import AutoConfig, AutoModelForCausalLM

        folder = self.folder
        (folder / "config.json").write_text(json.dumps(settings))
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32).eval()
        shapes = {name: tensor.shape for name, tensor in weights_of(model).items()}
        if shapes == {name: tensor.shape for name, tensor in self.weights.items()}:
            model.load_state_dict(self.weights)
        else:
            folder = folder / "other"
            shutil.rmtree(folder, ignore_errors=True)
            model = self._model(settings, folder)
        model.config.return_dict = True  # only changes the type of the output, which this code relies on
        return model(some_tokens(90)).logits, folder

    def check(self, settings: dict) -> None:
        """Compares the imported model with that of transformers; each of our configurations runs only once.

        Raises:
            UserError: a field is refused.
        """
        architecture, fields, _ = from_transformers(settings)
        expected, folder = self.logits(settings)
        key = (*fields, str(is_interleaved(settings)))
        found = self._ours.get(key)
        if found is None or folder != self.folder:
            model = load_config(None, fields).model
            decoder = Decoder(model, model.vocab_size, seed=1)
            load_weights(decoder, Tensors(folder), architecture, is_interleaved(settings))
            found = run_decoder(decoder, some_tokens(90))[0]
            if folder == self.folder:
                self._ours[key] = found
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5, msg=str(settings))


@pytest.mark.parametrize("family", BASES)
def test_every_field_gives_the_logits_of_transformers_or_is_refused(family, tmp_path):
    base = settings_of(family)
    checkpoint = Checkpoint(base, tmp_path / "base")
    refused = set()
    accepted = []
    for change in [{}, *({name: OTHER[name]} for name in fields_of(family)), *FURTHER]:
        if "norm_topk_prob" in change:
            change["norm_topk_prob"] = not base["norm_topk_prob"]
        try:
            checkpoint.check(base | change)
            accepted.append(change)
        except UserError as error:
            if not any(name in str(error) for name in change):
                raise
            refused |= change.keys()
    # Fields that vary between checkpoints must be supported.
    varying = SHAPES | {"rms_norm_eps", "tie_word_embeddings", "dtype", "num_experts_per_tok", "norm_topk_prob"}
    varying -= FROZEN.get(family, set())
    assert not refused & (varying & set(fields_of(family)) | {"rope_theta"})
    assert all(change in accepted for change in SUPPORTED[family])
    scaled = SCALED_LATENT if family in ("deepseek_v3", "longcat_flash") else SCALED
    assert all(change in accepted for change in FURTHER if change.get("rope_scaling") in scaled)


@pytest.mark.parametrize("family", BASES)
def test_missing_fields_have_the_default_of_the_family(family, tmp_path):
    """Including fields whose default depends on the family: Mixtral's ``rope_theta`` is a million."""
    base = settings_of(family)
    checkpoint = Checkpoint(base, tmp_path / "base")
    for name in sorted(base.keys() - SHAPES - FROZEN.get(family, set()) - {"model_type", "num_key_value_heads"}):
        checkpoint.check({key: value for key, value in base.items() if key != name})


@pytest.mark.parametrize("family", BASES)
def test_no_default_is_guessed_without_transformers(family, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    settings = settings_of(family) | {"head_dim": 8}
    assert from_transformers(settings)[0] == family
    del settings["rope_theta"]
    with pytest.raises(UserError, match=r"rope_theta is missing; add it to the file, or install transformers"):
        from_transformers(settings)


@pytest.mark.parametrize("family", BASES)
def test_every_field_of_the_class_is_in_one_table(family):
    import transformers

    mine = FAMILIES[family]
    default = getattr(transformers, mine.configuration)()
    fixed = FIXED | mine.fixed
    assert not mine.converted & fixed.keys()
    tables = [mine.converted, fixed, mine.ignored | IGNORED, KEPT]
    for name in {*fields_of(family), *transformers.GenerationConfig._get_default_generation_params()}:
        assert sum(name in table for table in tables) == (name != "architectures"), name
    for name in fixed.keys() & set(fields_of(family)):
        assert getattr(default, name) in fixed[name], f"{name}: the default is refused"


@pytest.mark.parametrize(("change", "words"), [
    ({"rope_theta": 500.0}, "rope_theta=500.0: only 10000.0"),  # ignored by the released code
    ({"num_key_value_heads": 2}, "num_key_value_heads=2: the released code uses num_attention_heads"),
    ({"expert_frequency": None}, "expert_frequency is missing"),
    ({"expert_frequency": 0}, "expert_frequency=0"),
    ({"head_dim": 8}, "head_dim=8: its effect is unknown"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear'"),
    ({"rope_scaling": {"rope_type": "default", "factor": 2.0}}, "factor=2.0"),
    ({"rope_scaling": "twice"}, "rope_scaling='twice': must be a mapping"),
])  # fmt: skip
def test_fields_of_the_papers_release(change, words):
    settings = json.loads((RELEASED / "config.json").read_text())
    with pytest.raises(UserError, match=words):
        from_transformers(settings | change)
    from_transformers(settings | {"experts_topk": 1, "pretraining_tp": 2, "rope_scaling": {"type": "default"}})


def test_unrelated_fields_of_published_files_are_accepted():
    said = {
        "_name_or_path": "somebody/model", "_attn_implementation_autoset": True, "is_llama_config": True,
        "rope_interleaved": False, "transformers.js_config": {"dtype": "q4"}, "unsloth_version": "2025.3",
        "unsloth_fixed": True, "pruned_heads": {}, "do_sample": True, "max_sequence_length": 4096, "qkv_bias": False,
        "task_specific_params": None, "tokenizer_class": "LlamaTokenizer", "gradient_checkpointing": False,
        "architectures": ["LlamaForCausalLM"], "something_new": None,
    }  # fmt: skip
    check_fields(settings_of("llama") | said, FAMILIES["llama"])
    qwen = {"shared_expert_intermediate_size": 0, "use_qk_norm": True, "qkv_bias": False, "sliding_window": 4096}
    check_fields(settings_of("qwen3_moe") | qwen, FAMILIES["qwen3_moe"])
    with pytest.raises(UserError, match="something_new=1: its effect is unknown; remove it if transformers' LlamaFor"):
        check_fields(settings_of("llama") | {"something_new": 1}, FAMILIES["llama"])
