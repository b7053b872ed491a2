#!/usr/bin/env bash
# LongCat-Flash in transformers gives its identity experts weights, saves them, and does not load a checkpoint without them.
#
# Expected: an identity expert returns its input, so it has no parameters, and a checkpoint has gate, up and down
# projections of the FFN experts only.
# Observed: transformers allocates gate and up projections for the identity experts too (but no down projections). Nothing
# reads them: the output does not depend on their values. They are counted as parameters, trained with zero gradients (so
# weight decay shrinks them), and saved. A checkpoint without them is refused, as the size of the stacked tensor differs.
#
# Seen with torch 2.13.0, transformers 5.24.0 (4 FFN experts and 2 identity experts):
#   saved gate projections: 6, down projections: 4
#   other weights of identity experts change the output: False
#   a checkpoint without them: refused
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install -qq torch==2.13.0
venv/bin/python -m pip install -qq transformers==5.24.0

venv/bin/python -I - <<'END'
import shutil

import torch
from safetensors.torch import load_file, save_file
from transformers import LongcatFlashConfig, LongcatFlashForCausalLM

config = LongcatFlashConfig(
    vocab_size=64, hidden_size=32, num_layers=1, num_attention_heads=2, ffn_hidden_size=48, q_lora_rank=16,
    kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, head_dim=8, v_head_dim=16, expert_ffn_hidden_size=24,
    n_routed_experts=4, zero_expert_num=2, moe_topk=3, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)
torch.manual_seed(0)
model = LongcatFlashForCausalLM(config).eval()
model.save_pretrained("saved")
tensors = load_file("saved/model.safetensors")
gates = sum(".experts." in name and ".gate_proj." in name for name in tensors)
downs = sum(".experts." in name and ".down_proj." in name for name in tensors)
print(f"saved gate projections: {gates}, down projections: {downs}")

tokens = torch.arange(20).view(1, -1)
with torch.no_grad():
    before = model(tokens).logits
    model.model.layers[0].mlp.experts.gate_up_proj[4:].fill_(7.0)
    changed = not torch.equal(model(tokens).logits, before)
print(f"other weights of identity experts change the output: {changed}")

shutil.copytree("saved", "lean")
lean = {name: value for name, value in tensors.items() if ".experts.4." not in name and ".experts.5." not in name}
save_file(lean, "lean/model.safetensors", {"format": "pt"})
try:
    LongcatFlashForCausalLM.from_pretrained("lean")
    loaded = "loaded"
except RuntimeError as error:
    assert "ignore_mismatched_sizes" in str(error)
    loaded = "refused"
print(f"a checkpoint without them: {loaded}")
assert (gates, downs, changed, loaded) == (6, 4, False, "refused")
END
