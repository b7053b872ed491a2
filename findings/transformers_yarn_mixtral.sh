#!/usr/bin/env bash
# transformers 5.24.0 builds a Mixtral with scaled rotary positions of every kind except YaRN.
#
# MixtralConfig leaves head_dim at null, which means hidden_size / num_attention_heads. The functions that compute the
# frequencies of the kinds "linear" and "llama3" read a null head_dim that way; the one of "yarn" multiplies it, so that
# AutoModelForCausalLM.from_config raises a TypeError that names neither the field nor the file. With head_dim written
# out, the same configuration works. Seen: "yarn: TypeError", the others "built", "yarn, head_dim=8: built".
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" --quiet install torch==2.13.0 transformers==5.24.0

cat >"$folder/show.py" <<'PYTHON'
from transformers import AutoModelForCausalLM, MixtralConfig

SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
         "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2, "max_position_embeddings": 64}
SHARED = {"factor": 4.0, "rope_theta": 10000.0}
KINDS = {
    "linear": {},
    "llama3": {"original_max_position_embeddings": 16, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": {"original_max_position_embeddings": 16},
}


def build(kind, **more):
    rope = {"rope_type": kind} | SHARED | KINDS[kind]
    try:
        AutoModelForCausalLM.from_config(MixtralConfig(**SIZES, rope_parameters=rope, **more))
    except Exception as error:
        return type(error).__name__
    return "built"


for kind in KINDS:
    print(f"{kind}: {build(kind)}")
print(f"yarn, head_dim=8: {build('yarn', head_dim=8)}")
PYTHON

seen=$("$folder/venv/bin/python" "$folder/show.py" 2>/dev/null)
printf '%s\n' "$seen"
expected='linear: built
llama3: built
yarn: TypeError
yarn, head_dim=8: built'
[ "$seen" = "$expected" ]
