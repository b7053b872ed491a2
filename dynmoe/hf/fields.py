"""Fields of ``config.json`` per family: converted fields, fields with fixed values, ignored fields.

A field in none of the three tables is refused, because its effect on the logits is unknown. A missing field has the
family's default, which is read from its configuration class in transformers.
"""

from __future__ import annotations

import copy
import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dynmoe.config.rope import RopeScalingConfig
from dynmoe.errors import UserError


@dataclass(frozen=True)
class Family:
    """The fields of one family of models.

    Attributes:
        model_class: the model's class, as listed in ``architectures``.
        configuration: the configuration class in transformers, which has the defaults; None if there is none.
        converted: fields that are converted to ours.
        fixed: fields with the only values that our decoder supports.
        ignored: fields that do not affect the logits, in addition to ``IGNORED``.
    """

    model_class: str
    configuration: str | None
    converted: set[str]
    fixed: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    ignored: set[str] = field(default_factory=set)


_DECODER = {
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "rms_norm_eps", "initializer_range", "tie_word_embeddings",
}  # fmt: skip
_COMMON = _DECODER | {"head_dim", "rope_theta", "rope_parameters", "rope_scaling"}
_TOP_K = _COMMON | {"num_experts", "num_local_experts", "num_experts_per_tok", "router_aux_loss_coef"}
_EXPERTS = {"moe_intermediate_size", "shared_expert_intermediate_size", "shared_expert_gate"}
_QWEN = {"norm_topk_prob", "moe_intermediate_size", "decoder_sparse_step", "mlp_only_layers", "sliding_window",
         "use_sliding_window"}  # fmt: skip
_LATENT = {"q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"}
_NO_SWITCH: dict[str, tuple[Any, ...]] = {"use_sliding_window": (False,)}
_NO_BIAS: dict[str, tuple[Any, ...]] = {"attention_bias": (False,)}
FAMILIES = {
    "llama": Family("LlamaForCausalLM", "LlamaConfig", _COMMON | {"attention_bias"}, _NO_SWITCH),
    "mixtral": Family("MixtralForCausalLM", "MixtralConfig", _TOP_K | {"sliding_window"},
                      {"norm_topk_prob": (True,), **_NO_SWITCH, **_NO_BIAS}),
    "olmoe": Family("OlmoeForCausalLM", "OlmoeConfig", _TOP_K | {"norm_topk_prob", "attention_bias"},
                    {"clip_qkv": (None,), **_NO_SWITCH}),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM", "Qwen3MoeConfig", _TOP_K | _QWEN | {"attention_bias"},
        {"shared_expert_intermediate_size": (0,), "use_qk_norm": (True,)},
        {"max_window_layers"},  # of other models
    ),
    "qwen2_moe": Family(
        "Qwen2MoeForCausalLM", "Qwen2MoeConfig",
        _TOP_K | _QWEN | {"shared_expert_intermediate_size", "layer_types", "max_window_layers"},
        {"qkv_bias": (True, False), **_NO_BIAS},  # the biases themselves are checked
    ),
    "deepseek_v3": Family(
        "DeepseekV3ForCausalLM", "DeepseekV3Config",
        _COMMON | _LATENT | {"rope_interleave", "n_routed_experts", "n_shared_experts", "moe_intermediate_size",
        "first_k_dense_replace", "num_experts_per_tok", "n_group", "topk_group", "norm_topk_prob",
        "routed_scaling_factor"},
        # The last three are in published files, and nothing in transformers reads them.
        {**_NO_BIAS, "moe_layer_freq": (1,), "scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)},
        # Losses of the pretraining, its layout, and layers that predict further tokens, which model.mtp.layers imports.
        {"aux_loss_alpha", "seq_aux", "ep_size", "num_nextn_predict_layers", "num_mtp_layers", "qk_head_dim"},
    ),
    "longcat_flash": Family(
        "LongcatFlashForCausalLM", "LongcatFlashConfig",
        _COMMON | _LATENT | {"num_layers", "qk_head_dim", "ffn_hidden_size", "expert_ffn_hidden_size",
        "moe_intermediate_size", "n_routed_experts", "num_local_experts", "zero_expert_num", "moe_topk",
        "num_experts_per_tok", "routed_scaling_factor"},
        # All but the first are in published files, and transformers reads none of them or disregards it.
        {**_NO_BIAS, "router_bias": (False,), "zero_expert_type": ("identity",), "attention_method": ("MLA",),
         "mla_scale_q_lora": (True,), "mla_scale_kv_lora": (True,)},
    ),
    # Our exports of models that transformers has no architecture for.
    "dynmoe": Family(
        "DynMoEForCausalLM", None,
        _COMMON | _EXPERTS | {"layer_experts", "num_experts", "qk_norm", "router", "auto_map"}
        | {"sliding_window", "layer_types", "attention_bias"},
        {"router_overrides": (None,), **_NO_SWITCH}, {"count_experts"},
    ),
    # The release of arXiv 2403.07652, whose code ignores rope_theta and always uses this base.
    "dynamic_moe": Family(
        "MoEForCausalLM", None, _DECODER | {"rope_scaling", "num_experts", "expert_frequency", "top_p_threshold"},
        {"rope_theta": (10000.0,), **_NO_SWITCH, **_NO_BIAS}, {"experts_topk"},
    ),
}  # fmt: skip
# Fields that an import keeps for a later export, for any family.
KEPT = ("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")

# Some files contain these although their family has no such field.
FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",), "mlp_bias": (False,), "qkv_bias": (False,),
    "is_causal": (True,), "is_encoder_decoder": (False,), "add_cross_attention": (False,),
    "partial_rotary_factor": (1.0,), "rope_interleaved": (False,),
}  # fmt: skip
IGNORED = {
    "model_type", "transformers_version", "transformers.js_config", "dtype", "torch_dtype", "use_bfloat16",
    "name_or_path", "use_cache", "return_dict", "output_hidden_states", "output_attentions", "output_router_logits",
    "chunk_size_feed_forward", "gradient_checkpointing", "attn_implementation", "experts_implementation",
    "pretraining_tp", "is_decoder", "is_llama_config", "tie_encoder_decoder", "torchscript", "tf_legacy_loss",
    "model_max_length", "max_sequence_length", "tokenizer_class", "prefix", "sep_token_id", "decoder_start_token_id",
    "id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params",
    "unsloth_fixed", "unsloth_version",
    "attention_dropout", "router_jitter_noise",  # noise in training, which our decoder does not have
    # Generation settings, which older files store here.
    "assistant_confidence_threshold", "assistant_lookbehind", "bad_words_ids", "begin_suppress_tokens",
    "diversity_penalty", "do_sample", "early_stopping", "encoder_no_repeat_ngram_size", "encoder_repetition_penalty",
    "epsilon_cutoff", "eta_cutoff", "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id",
    "length_penalty", "max_length", "min_length", "no_repeat_ngram_size", "num_assistant_tokens",
    "num_assistant_tokens_schedule", "num_beam_groups", "num_beams", "num_return_sequences", "output_scores",
    "remove_invalid_values", "repetition_penalty", "return_dict_in_generate", "suppress_tokens", "target_lookbehind",
    "temperature", "top_k", "top_p", "typical_p",
}  # fmt: skip
RESTORE = "restore the checkpoint's own file"


def check_fields(found: Mapping[str, Any], family: Family) -> None:
    """Checks that no field makes, or may make, the logits differ from those of our decoder.

    Raises:
        UserError: there is such a field.
    """
    fixed = FIXED | family.fixed | {"architectures": ([family.model_class],)}
    known = family.converted | family.ignored | IGNORED | {*KEPT, *fixed}
    for name, value in found.items():
        if value in (None, [], {}):
            continue
        if name == "quantization_config":
            cure = "quantized weights are not supported; save them in bf16 or fp32 first"
            raise UserError(f"config.json: {name}={shown(value)}: {cure}")
        if name in fixed and value not in fixed[name]:
            raise UserError(f"config.json: {name}={shown(value)}: only {fixed[name][0]!r} can be imported")
        if name not in known and not name.startswith("_"):
            cure = f"remove it if transformers' {family.model_class} works without it"
            raise UserError(f"config.json: {name}={shown(value)}: its effect is unknown; {cure}")


class Settings:
    """The fields of a checkpoint; reading a missing field raises an error that names it.

    Args:
        found: fields by name.
        cure: the fix for a missing field, for the error message.
        path: prefix of the field names, for a mapping within the file.
    """

    def __init__(self, found: Mapping[str, Any], cure: str = RESTORE, path: str = "") -> None:
        self._found = found
        self._cure = cure
        self._path = path

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def __getitem__(self, name: str) -> Any:
        if self.optional(name) is None:
            raise UserError(f"config.json: {self._path}{name} is missing; {self._cure}")
        return self._found[name]

    def optional(self, name: str) -> Any:
        """A field that may be null, but not missing."""
        if name not in self._found:
            raise UserError(f"config.json: {self._path}{name} is missing; {self._cure}")
        return self._found[name]

    def count(self, *names: str) -> int:
        """A positive integer, under the first of these names that exists."""
        name = next((name for name in names if self._found.get(name) is not None), names[0])
        value = self[name]
        if type(value) is not int or value < 1:
            raise UserError(f"config.json: {self._path}{name}={shown(value)}: must be a positive integer; {RESTORE}")
        return value

    @property
    def _rope(self) -> Mapping[str, Any]:
        return self._found.get("rope_scaling") or self._found.get("rope_parameters") or {}

    def rope_theta(self) -> Any:
        """Base of the rotary positions: a top-level field or, since transformers 5, a field of ``rope_parameters``."""
        return self["rope_theta"] if self._rope.get("rope_theta") is None else self._rope["rope_theta"]

    def rope_scaling(self) -> dict[str, Any]:
        """The fields of ``model.rope_scaling``, without defaults."""
        rope = {name: value for name, value in self._rope.items() if value is not None}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind == "default":
            return {}
        scaling = {"kind": kind} | {ours: rope[name] for name, ours in _ROPE[kind].items() if name in rope}
        above, below = rope.get("mscale", 0), rope.get("mscale_all_dim", 0)
        if kind == "yarn" and above and below and "attention_factor" not in scaling:
            turn = 0.1 * math.log(scaling["factor"])
            scaling["attention_factor"] = (above * turn + 1.0) / (below * turn + 1.0)
        return scaling

    def latent_rope_scaling(self) -> dict[str, Any]:
        """The same for latent attention, whose ``attention_factor`` is for all of a query and key.

        transformers multiplies what is rotated by its own factor, and all of it as ``mscale_all_dim`` says.

        Raises:
            UserError: YaRN multiplies what is rotated by another factor than the rest.
        """
        scaling = self.rope_scaling()
        if scaling.get("kind") != "yarn":
            return scaling
        turn = 0.1 * math.log(scaling["factor"])
        above, below = (self._rope.get(name) for name in ("mscale", "mscale_all_dim"))
        if scaling.get("attention_factor", turn + 1.0) != 1.0:
            found = f"rope_parameters, rope_scaling: mscale={above}, mscale_all_dim={below}"
            raise UserError(f"config.json: {found}: only equal ones can be imported with latent attention")
        scaling.pop("attention_factor", None)
        # The usual factor is left to be computed, so that it follows if the positions are stretched further.
        is_usual = math.isclose(below or 0.0, 1.0)
        return scaling if is_usual else scaling | {"attention_factor": (below or 0.0) * turn + 1.0}


def settings_of(found: Mapping[str, Any], family: Family) -> Settings:
    """The converted and kept fields of ``found``, with the family's defaults from transformers if it is installed.

    Raises:
        UserError: transformers rejects a field, or our decoder has no such rotary positions.
    """
    names = family.converted | set(KEPT)
    given = {name: copy.deepcopy(found[name]) for name in names & found.keys()}
    for name in ("rope_parameters", "rope_scaling"):
        _check_rope(name, given.get(name) or {})
    if family.configuration is None:
        return Settings(given)
    try:
        import transformers
    except ImportError:
        return Settings(given, "add it to the file, or install transformers, which has the family's default")
    try:
        config = getattr(transformers, family.configuration)(**given)
    except Exception as error:
        words = " ".join(str(error).split())
        raise UserError(f"config.json: transformers rejects it ({words}); {RESTORE}") from None
    return Settings({name: getattr(config, name, None) for name in names})


# Fields of ``rope_parameters`` by kind, each with our field.
_ROPE: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "yarn": {
        "factor": "factor", "original_max_position_embeddings": "original_length", "beta_fast": "beta_fast",
        "beta_slow": "beta_slow", "attention_factor": "attention_factor", "truncate": "truncate",
    },
    "llama3": {
        "factor": "factor", "original_max_position_embeddings": "original_length", "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
    },
}  # fmt: skip
# What any kind may contain, and what only changes YaRN's attention_factor.
_ANY_ROPE = {"rope_type", "type", "rope_theta"}
_MULTIPLES = {"mscale", "mscale_all_dim"}


def _check_rope(name: str, rope: Any) -> None:
    """Refuses rotary positions that we do not have, even if transformers would read another field than ``name``."""
    if not isinstance(rope, Mapping):
        raise UserError(f"config.json: {name}={shown(rope)}: must be a mapping; {RESTORE}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in _ROPE:
        kinds = ", ".join(_ROPE)
        raise UserError(f"config.json: {name}: rope_type={shown(kind)}: cannot be imported; only {kinds} can")
    known = _ANY_ROPE | _ROPE[kind].keys() | (_MULTIPLES if kind == "yarn" else set())
    for key, value in rope.items():
        if key not in known and value is not None:
            raise UserError(f"config.json: {name}: {key}={shown(value)}: {kind} positions with it cannot be imported")


def write_rope(theta: float, scaling: RopeScalingConfig) -> dict[str, Any]:
    """``rope_parameters`` of an export."""
    kind = scaling.kind or "default"
    written = {name: getattr(scaling, ours) for name, ours in _ROPE[kind].items()}
    given = {name: value for name, value in written.items() if value is not None}
    return {"rope_theta": theta, "rope_type": kind} | given


def shown(value: Any) -> str:
    """A value of a file, shortened to one line."""
    return " ".join(reprlib.repr(value).split())
