#!/usr/bin/env bash
# PyTorch's FLOP counter misses the experts of transformers' models.
#
# Expected: torch.utils.flop_counter.FlopCounterMode counts all matrix products, as it does for dense models.
# Observed: By default, transformers 5 computes experts with torch.nn.functional.grouped_mm where it exists, and the
# counter has no rule for its operator. It counts nothing for the experts, which are most of the model, and does not warn.
# With the other implementations ("eager", "batched_mm") it counts every product. FLOPs and utilization of an MoE model
# measured in this way are those of its attention.
#
# Seen with torch 2.13.0, transformers 5.24.0 (Mixtral, two layers, 32 tokens, forward and backward):
#   eager:      6,733,824 FLOPs
#   batched_mm: 6,733,824 FLOPs
#   grouped_mm: 2,015,232 FLOPs (the default)
#   experts by hand: 4,718,592 FLOPs, exactly what is missing
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install -qq torch==2.13.0
venv/bin/python -m pip install -qq transformers==5.24.0

venv/bin/python -I - <<'END'
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import MixtralConfig, MixtralForCausalLM

BATCH, LENGTH, WIDTH, INNER, LAYERS, K = 2, 16, 32, 64, 2, 2
config = MixtralConfig(
    vocab_size=64, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=LAYERS, num_attention_heads=2,
    num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=K,
)
torch.manual_seed(0)
model = MixtralForCausalLM(config)
default = model.config._experts_implementation
tokens = torch.randint(64, (BATCH, LENGTH))

counted = {}
for way in ("eager", "batched_mm", "grouped_mm"):
    model.set_experts_implementation(way)
    with FlopCounterMode(display=False) as counter:
        model(tokens).logits.sum().backward()
    counted[way] = counter.get_total_flops()
    print(f"{way + ':':11} {counted[way]:,} FLOPs{' (the default)' if way == default else ''}")
# Three matrices per expert, two operations per weight, once forward and twice backward.
experts = 3 * 2 * (BATCH * LENGTH * K) * 3 * WIDTH * INNER * LAYERS
print(f"experts by hand: {experts:,} FLOPs, exactly what is missing")
assert default == "grouped_mm", "another implementation is the default"
assert counted["eager"] == counted["batched_mm"], "these two were counted alike"
assert counted["eager"] - counted["grouped_mm"] == experts, "the grouped product is counted now"
END
