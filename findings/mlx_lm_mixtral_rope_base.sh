#!/usr/bin/env bash
# mlx-lm runs a Mixtral saved by transformers 5 with the wrong rotary base, without a warning.
#
# Expected: mlx-lm uses the base in config.json, or refuses the model.
# Observed: transformers 5 writes the base only as rope_parameters.rope_theta. mlx-lm's Mixtral looks for rope_theta at
# the top level and otherwise uses its default of 1,000,000. All weights load without a warning, but the model computes
# something else. Adding rope_theta at the top level of config.json helps, and transformers 5 still reads such a file
# correctly. This happens although mlx-lm requires transformers 5 and both are installed together.
#
# Seen with torch 2.13.0, transformers 5.24.0, mlx 0.32.4, mlx-lm 0.32.2 (a base of 10,000, 48 tokens, random weights):
#   config.json: rope_theta None, rope_parameters {'rope_theta': 10000.0, 'rope_type': 'default'}
#   as saved:            mlx-lm's base 1000000, logits differ by at most 12.400 at a standard deviation of 2.32
#   with rope_theta:     mlx-lm's base 10000, logits differ by at most 0.000 at a standard deviation of 2.32
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install -qq torch==2.13.0
venv/bin/python -m pip install -qq transformers==5.24.0 'mlx[cpu]==0.32.4' mlx-lm==0.32.2

# Nothing is compiled: that would need a C++ compiler.
MLX_DISABLE_COMPILE=1 venv/bin/python -I - <<'END'
import contextlib
import io
import json
from pathlib import Path

import mlx.core as mx
import numpy
import torch
import transformers
from mlx_lm.utils import load_model
from transformers import MixtralConfig, MixtralForCausalLM

transformers.logging.disable_progress_bar()
mx.set_default_device(mx.cpu)
folder, tokens = Path("model"), list(range(48))
config = MixtralConfig(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, initializer_range=0.3,
    rope_parameters={"rope_type": "default", "rope_theta": 1e4},
)  # fmt: skip
torch.manual_seed(0)
MixtralForCausalLM(config).save_pretrained(folder)
saved = json.loads((folder / "config.json").read_text())
print(f"config.json: rope_theta {saved.get('rope_theta')}, rope_parameters {saved['rope_parameters']}")
assert "rope_theta" not in saved, "transformers writes the base at the top level as well"
assert saved["rope_parameters"]["rope_theta"] == 1e4


def difference(case: str) -> float:
    """By how much the logits of transformers and mlx-lm differ at most, each from the same folder."""
    with torch.no_grad():
        expected = MixtralForCausalLM.from_pretrained(folder).eval()(torch.tensor([tokens])).logits[0].numpy()
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        model, _ = load_model(folder)
        got = numpy.array(model(mx.array([tokens])))[0]
    assert not said.getvalue(), f"mlx-lm prints something: {said.getvalue()}"
    apart = abs(got - expected).max().item()
    print(
        f"{case:20} mlx-lm's base {model.args.rope_theta:.0f}, logits differ by at most {apart:.3f} "
        f"at a standard deviation of {expected.std():.2f}"
    )
    return apart


assert difference("as saved:") > 1, "mlx-lm reads the base that transformers 5 writes"
(folder / "config.json").write_text(json.dumps(saved | {"rope_theta": 1e4}))
assert difference("with rope_theta:") < 1e-3, "the base does not explain the difference"
END
