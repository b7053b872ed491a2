#!/usr/bin/env bash
# A model saved by transformers 5 has another rotary base in transformers 4, without a warning.
#
# Expected: The older version reads the fields it knows, or reports those it does not know.
# Observed: transformers 5 writes the base only as rope_parameters.rope_theta. transformers 4 keeps that entry, ignores
# it, and uses its own default for rope_theta (10,000 for OLMoE, 1,000,000 for Mixtral). All weights load and nothing is
# logged, but the model computes something else, increasingly so at later positions. Any other reader of config.json that
# looks for rope_theta is affected in the same way.
#
# Seen with torch 2.13.0, transformers 5.24.0 to save and 4.57.3 to load (OLMoE with a base of 1,000,000):
#   config.json: rope_theta None, rope_parameters {'rope_theta': 1000000.0, 'rope_type': 'default'}
#   transformers 5.24.0: base 1000000, logits differ by at most 0.00 at a standard deviation of 2.34; 0 warnings
#   transformers 4.57.3: base 10000, logits differ by at most 11.34 at a standard deviation of 2.34; 0 warnings
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install -qq torch==2.13.0
venv/bin/python -m pip install -qq transformers==5.24.0
# In a separate folder, without the common dependencies.
venv/bin/python -m pip install -qq --no-deps --target old transformers==4.57.3 huggingface_hub==0.36.0 tokenizers==0.22.1
venv/bin/python -m pip install -qq requests

cat > save.py <<'END'
import json

import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

config = OlmoeConfig(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, max_position_embeddings=64, initializer_range=0.3,
    eos_token_id=0, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
)  # fmt: skip
torch.manual_seed(0)
model = OlmoeForCausalLM(config).eval()
model.save_pretrained("model")
with torch.no_grad():
    torch.save(model(torch.arange(48)[None]).logits, "logits.pt")
saved = json.load(open("model/config.json"))
print(f"config.json: rope_theta {saved.get('rope_theta')}, rope_parameters {saved['rope_parameters']}")
END
cat > load.py <<'END'
import logging

import torch
import transformers

warned = []
handler = logging.Handler()
handler.emit = lambda record: warned.append(record.getMessage())
transformers.logging.add_handler(handler)
transformers.logging.set_verbosity_warning()
transformers.logging.disable_progress_bar()
model = transformers.AutoModelForCausalLM.from_pretrained("model").eval()
base = round(1 / model.model.rotary_emb.inv_freq[1].item() ** (model.config.hidden_size / 2 / 2))
expected = torch.load("logits.pt")
with torch.no_grad():
    difference = (model(torch.arange(48)[None]).logits - expected).abs().max().item()
print(
    f"transformers {transformers.__version__}: base {base}, logits differ by at most {difference:.2f} "
    f"at a standard deviation of {expected.std().item():.2f}; {len(warned)} warnings"
)
if transformers.__version__.startswith("5"):
    assert difference < 1e-4, "transformers 5 does not read what it wrote"
else:
    assert difference > 1, "the older version reads the newer base"
    assert not warned, "the older version warns now"
END
venv/bin/python save.py 2> log || { cat log >&2; exit 1; }
venv/bin/python load.py
PYTHONPATH=old venv/bin/python load.py
