#!/usr/bin/env bash
# llama.cpp repeats one token forever, without an error, for a Qwen2-MoE whose shared-expert gate is zero.
#
# Expected: The sigmoid of zero is one half, as in transformers. A gate of zeros is valid, and is what a model without
# such a gate gets when it is converted to Qwen2-MoE.
# Observed: llama.cpp computes the sigmoid as silu(x) / x, which is 0 / 0 here. The logits are NaN, log-probabilities are
# null, and greedy decoding repeats the same token. Weights of 1e-10 instead of zeros give one half.
#
# Seen with xllamacpp 2026.10.11549 (llama.cpp of October 2026), gguf 0.19.0, Python 3.11:
#   gate of 0:     tokens all the same, log-probability None
#   gate of 1e-10: other tokens, log-probabilities finite
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install -qq xllamacpp==2026.10.11549 gguf==0.19.0 numpy==2.3.5

venv/bin/python -I - 2>messages <<'END'
import json
import math
import urllib.request

import gguf
import numpy
import xllamacpp

VOCABULARY, HIDDEN, HEADS, EXPERTS, WIDTH = 16, 64, 2, 4, 32


def write(path, gate):
    draw = numpy.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "qwen2moe")
    writer.add_context_length(64)
    writer.add_block_count(1)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(2)
    writer.add_expert_feed_forward_length(WIDTH)
    writer.add_expert_shared_feed_forward_length(WIDTH)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *"abcdefghijklm"])
    writer.add_token_scores([0.0] * VOCABULARY)
    writer.add_token_types([2, 3, 3] + [1] * (VOCABULARY - 3))
    shapes = {
        "token_embd": (VOCABULARY, HIDDEN), "output": (VOCABULARY, HIDDEN),
        "blk.0.attn_q": (HIDDEN, HIDDEN), "blk.0.attn_k": (HIDDEN, HIDDEN), "blk.0.attn_v": (HIDDEN, HIDDEN),
        "blk.0.attn_output": (HIDDEN, HIDDEN), "blk.0.ffn_gate_inp": (EXPERTS, HIDDEN),
        "blk.0.ffn_gate_exps": (EXPERTS, WIDTH, HIDDEN), "blk.0.ffn_up_exps": (EXPERTS, WIDTH, HIDDEN),
        "blk.0.ffn_down_exps": (EXPERTS, HIDDEN, WIDTH), "blk.0.ffn_gate_shexp": (WIDTH, HIDDEN),
        "blk.0.ffn_up_shexp": (WIDTH, HIDDEN), "blk.0.ffn_down_shexp": (HIDDEN, WIDTH),
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", draw.normal(0, 0.3, shape).astype(numpy.float32))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", numpy.ones(HIDDEN, numpy.float32))
    writer.add_tensor("blk.0.ffn_gate_inp_shexp.weight", numpy.full(HIDDEN, gate, numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def ask(path):
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel, settings.warmup = path, 64, 1, False
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(settings)
    wanted = {"prompt": [3, 4, 5], "n_predict": 8, "temperature": 0.0, "n_probs": 1, "return_tokens": True}
    request = urllib.request.Request(f"{server.listening_address}/completion", json.dumps(wanted).encode())
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=60) as reply:
        said = json.load(reply)
    return said["tokens"], [step["logprob"] for step in said["completion_probabilities"]]


for gate in (0.0, 1e-10):
    write("model.gguf", gate)
    tokens, logprobs = ask("model.gguf")
    print(f"gate of {gate:g}: tokens {tokens}, log-probabilities {[p and round(p, 3) for p in logprobs]}")
    if gate == 0.0:
        assert len(set(tokens)) == 1 and set(logprobs) == {None}, "a gate of zero gives numbers now"
    else:
        assert all(math.isfinite(p) for p in logprobs), "a gate of nearly zero is no number"
END
