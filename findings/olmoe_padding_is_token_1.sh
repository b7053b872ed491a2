#!/usr/bin/env bash
# An OLMoE created from a config cannot learn token 1: its embedding is zero and stays zero.
#
# Expected: A new model with its own vocabulary and no padding token learns all of its tokens, as Mixtral and Qwen-MoE do.
# Observed: OlmoeConfig has pad_token_id=1 by default (the padding token of OLMoE's own tokenizer). That embedding row is
# zero and gets no gradient. In other vocabularies token 1 is often the beginning of each text or a common character.
# There is no warning. After a text of only this token, all logits are zero and each token is equally likely. The fix is
# pad_token_id=None.
#
# Seen with torch 2.13.0, transformers 5.24.0 (a vocabulary of 16, each token once in the batch, random weights):
#   OLMoE                           pad_token_id 1     token 1: embedding 0.000, gradient 0.000, largest logit 0.000
#   OLMoE with pad_token_id=None    pad_token_id None  token 1: embedding 0.110, gradient 0.605, largest logit 0.111
#   Mixtral                         pad_token_id None  token 1: embedding 0.110, gradient 0.349, largest logit 0.111
#   Qwen2-MoE                       pad_token_id None  token 1: embedding 0.088, gradient 0.508, largest logit 0.211
#   Qwen3-MoE                       pad_token_id None  token 1: embedding 0.110, gradient 0.616, largest logit 0.114
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install -qq torch==2.13.0
venv/bin/python -m pip install -qq transformers==5.24.0

venv/bin/python -I - <<'END'
import logging

import torch
import transformers
from transformers import AutoModelForCausalLM, MixtralConfig, OlmoeConfig, Qwen2MoeConfig, Qwen3MoeConfig

warned = []
handler = logging.Handler()
handler.emit = lambda record: warned.append(record.getMessage())
transformers.logging.add_handler(handler)
transformers.logging.set_verbosity_warning()

sizes = dict(
    vocab_size=16, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, num_experts_per_tok=2, bos_token_id=None, eos_token_id=0,
)  # fmt: skip
configs = {
    "OLMoE": OlmoeConfig(**sizes, num_experts=4),
    "OLMoE with pad_token_id=None": OlmoeConfig(**sizes, num_experts=4, pad_token_id=None),
    "Mixtral": MixtralConfig(**sizes, num_local_experts=4),
    "Qwen2-MoE": Qwen2MoeConfig(**sizes, num_experts=4, moe_intermediate_size=32, shared_expert_intermediate_size=32),
    "Qwen3-MoE": Qwen3MoeConfig(**sizes, num_experts=4, moe_intermediate_size=32),
}
tokens = torch.arange(16)[None]
for name, config in configs.items():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model(tokens, labels=tokens).loss.backward()
    weight = model.get_input_embeddings().weight
    norms, gradients = weight.norm(dim=1), weight.grad.norm(dim=1)
    with torch.no_grad():
        largest = model(torch.ones(1, 4, dtype=torch.long)).logits.abs().max().item()
    print(
        f"{name:31} pad_token_id {config.pad_token_id!s:5} token 1: embedding {norms[1]:.3f}, "
        f"gradient {gradients[1]:.3f}, largest logit {largest:.3f}"
    )
    others = torch.arange(15) != 1  # the last token is followed by none
    assert norms[:15][others].min() > 0.01 and gradients[:15][others].min() > 0.01
    if name == "OLMoE":
        assert norms[1] == gradients[1] == largest == 0, "token 1 is learned like any other now"
    else:
        assert norms[1] > 0.01 and gradients[1] > 0.01 and largest > 0.01
assert not warned, f"there are warnings: {warned}"
END
