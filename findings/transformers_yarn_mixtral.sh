#!/usr/bin/env bash
# transformers builds a Mixtral with scaled rotary positions of every kind except YaRN.
#
# Expected: MixtralConfig leaves head_dim at null, which stands for hidden_size / num_attention_heads. Every rope_type of
# rope_parameters then works, as for Llama.
# Observed: The functions that compute the frequencies of "linear" and "llama3" read a null head_dim that way. The one of
# "yarn" multiplies it: AutoModelForCausalLM.from_config ends in a TypeError that names neither field nor file. With
# head_dim written out, the same configuration works.
#
# Seen with transformers 5.24.0, torch 2.13.0, Python 3.11:
#   linear              built
#   llama3              built
#   yarn                TypeError
#   yarn, head_dim=8    built
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install -qq torch==2.13.0
venv/bin/python -m pip install -qq transformers==5.24.0

venv/bin/python -I - 2>/dev/null <<'END'
from transformers import AutoModelForCausalLM, MixtralConfig

SIZES = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "num_local_experts": 2, "max_position_embeddings": 64,
}
KINDS = {
    "linear": {},
    "llama3": {"original_max_position_embeddings": 16, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": {"original_max_position_embeddings": 16},
}


def build(kind: str, **more: int) -> str:
    rope = {"rope_type": kind, "factor": 4.0, "rope_theta": 10000.0, **KINDS[kind]}
    try:
        AutoModelForCausalLM.from_config(MixtralConfig(**SIZES, rope_parameters=rope, **more))
    except Exception as error:
        return type(error).__name__
    return "built"


seen = {kind: build(kind) for kind in KINDS} | {"yarn, head_dim=8": build("yarn", head_dim=8)}
for kind, outcome in seen.items():
    print(f"{kind:18}  {outcome}")
assert list(seen.values()) == ["built", "built", "TypeError", "built"]
END
