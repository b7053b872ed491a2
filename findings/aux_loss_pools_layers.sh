#!/usr/bin/env bash
# The balance loss of transformers' models misses layers that collapse onto different experts.
#
# Expected: The balance loss is computed per layer and then summed or averaged, because each layer has its own experts. A
# layer that uses only two of its four experts is unbalanced whatever the other layers do.
# Observed: load_balancing_loss_func (Mixtral, Qwen-MoE, OLMoE and others) sums the tokens and probabilities of "expert i"
# over all layers before it multiplies them, as if expert i were the same in every layer. If a first layer sends
# everything to experts 0 and 1, and a second one to experts 2 and 3, the loss is that of perfect balance.
#
# Seen with torch 2.13.0, transformers 5.24.0 (Mixtral, 4 experts, 2 per token; balance gives 2, collapse 4):
#   tokens per expert [48, 48, 0, 0] and [48, 48, 0, 0]: aux_loss 4.00, mean over layers 4.00
#   tokens per expert [48, 48, 0, 0] and [0, 0, 48, 48]: aux_loss 2.00, mean over layers 4.00
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install -qq torch==2.13.0
venv/bin/python -m pip install -qq transformers==5.24.0

venv/bin/python -I - <<'END'
import torch
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

config = MixtralConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
)
torch.manual_seed(0)
model = MixtralForCausalLM(config).eval()
tokens = torch.randint(64, (3, 16))


@torch.no_grad()
def run(*preferred: tuple[int, int]) -> tuple[list[list[int]], float, float]:
    """Tokens per expert of each layer, the model's balance loss, and the mean of that of single layers."""
    model.model.embed_tokens.weight[:, 0] = 10.0  # the first feature is large in every token
    for layer, experts in zip(model.model.layers, preferred, strict=True):
        layer.mlp.gate.weight.zero_()
        layer.mlp.gate.weight[list(experts), 0] = 5.0
    output = model(tokens, output_router_logits=True)
    counts = [logits.topk(2).indices.flatten().bincount(minlength=4).tolist() for logits in output.router_logits]
    layers = [load_balancing_loss_func((logits,), 4, 2).item() for logits in output.router_logits]
    return counts, output.aux_loss.item(), sum(layers) / len(layers)


results = [run((0, 1), (0, 1)), run((0, 1), (2, 3))]
for counts, pooled, mean in results:
    print(f"tokens per expert {counts[0]} and {counts[1]}: aux_loss {pooled:.2f}, mean over layers {mean:.2f}")
same, opposite = results
assert same[0] == [[48, 48, 0, 0]] * 2
assert opposite[0] == [[48, 48, 0, 0], [0, 0, 48, 48]]
assert abs(same[1] - 4) < 0.01
assert abs(opposite[1] - 2) < 0.01, "the loss sees single layers now"
assert abs(same[2] - 4) < 0.01
assert abs(opposite[2] - 4) < 0.01
END
