#!/usr/bin/env bash
# mlx-lm runs a Qwen2-MoE whose gates sum to 1 with gates that do not, without a warning.
#
# Expected: mlx-lm uses norm_topk_prob of config.json, as its Qwen3-MoE does, or refuses the model.
# Observed: its Qwen2-MoE does not have the field. A model that was saved with norm_topk_prob=true loads without a
# warning, with the gates of the selected experts as softmax gave them, and computes something else.
#
# Seen with torch 2.13.0, transformers 5.24.0, mlx 0.32.4, mlx-lm 0.32.2 (2 of 4 experts, 48 tokens, random weights):
#   norm_topk_prob=False: logits differ by at most 0.000 at a standard deviation of 2.46
#   norm_topk_prob=True:  logits differ by at most 3.850 at a standard deviation of 2.45
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
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

transformers.logging.disable_progress_bar()
mx.set_default_device(mx.cpu)
tokens = list(range(48))


def difference(normalized: bool) -> float:
    """How much the logits of transformers and mlx-lm differ at most, for a model with or without normalized gates."""
    config = Qwen2MoeConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, moe_intermediate_size=64,
        shared_expert_intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        num_experts=4, num_experts_per_tok=2, norm_topk_prob=normalized, initializer_range=0.3,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )  # fmt: skip
    folder = Path(f"model_{normalized}")
    torch.manual_seed(0)
    Qwen2MoeForCausalLM(config).save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text())
    assert saved["norm_topk_prob"] == normalized
    # mlx-lm looks for the rotary base at the top level, which is another matter.
    (folder / "config.json").write_text(json.dumps(saved | {"rope_theta": 1e4}))
    with torch.no_grad():
        expected = Qwen2MoeForCausalLM.from_pretrained(folder).eval()(torch.tensor([tokens])).logits[0].numpy()
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        model, _ = load_model(folder)
        got = numpy.array(model(mx.array([tokens])))[0]
    assert not said.getvalue(), f"mlx-lm prints something: {said.getvalue()}"
    apart = abs(got - expected).max().item()
    case = f"norm_topk_prob={normalized}:"
    print(f"{case:21} logits differ by at most {apart:.3f} at a standard deviation of {expected.std():.2f}")
    return apart


assert difference(False) < 1e-3, "something other than the gates differs"
assert difference(True) > 0.5, "mlx-lm uses norm_topk_prob"
END
