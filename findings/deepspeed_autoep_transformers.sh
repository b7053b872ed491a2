#!/usr/bin/env bash
# DeepSpeed's AutoEP fails with transformers 5.23 and later: deepspeed.initialize raises a TypeError.
#
# Expected: AutoEP ("expert_parallel" in the config) supports Mixtral in any transformers from 5.0, the only requirement
# of its preset, or reports an unsupported version.
# Observed: After replacing the MoE layers, AutoEP registers the recording of router logits by calling get(key, default)
# on a private dict of transformers (_CAN_RECORD_REGISTRY). In 5.22 that is a plain dict. Since 5.23 it is a subclass
# whose get takes only a model, so AutoEP's own check accepts it. The error mentions neither AutoEP nor a version, and the
# layers of the model have already been replaced.
#
# Seen with torch 2.13.0, deepspeed 0.19.8 (Mixtral with 4 experts, two gloo ranks on a CPU, SGD):
#   transformers 5.22.2: loss 4.1599, without DeepSpeed 4.1599; after a step 4.0514
#   transformers 5.23.0: TypeError: _CanRecordRegistry.get() takes 2 positional arguments but 3 were given
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install -qq torch==2.13.0 setuptools
venv/bin/python -m pip install -qq deepspeed==0.19.8 transformers==5.22.2
# In a separate folder, without the common dependencies.
venv/bin/python -m pip install -qq --no-deps --target new transformers==5.23.0

cat > rank.py <<'END'
"""One step of training on one of two ranks that share the experts."""
import logging

logging.disable(logging.WARNING)
import deepspeed
import torch
import torch.distributed as dist
import transformers
from transformers import MixtralConfig, MixtralForCausalLM

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # needs no compiler
deepspeed.init_distributed("gloo", verbose=False)
rank, world = dist.get_rank(), dist.get_world_size()
assert world == 2
config = MixtralConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
)  # fmt: skip
torch.manual_seed(0)
model = MixtralForCausalLM(config)
tokens = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(1 + rank))
with torch.no_grad():
    expected = model(tokens, labels=tokens).loss.item()


def step() -> str:
    """What comes of one step: the error of deepspeed.initialize, or the losses before and after."""
    try:
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            config={
                "train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 0},
                "expert_parallel": {"enabled": True, "autoep_size": world, "use_grouped_mm": False},
            },
        )  # fmt: skip
    except TypeError as error:
        return f"TypeError: {error}"
    loss = engine(tokens, labels=tokens).loss
    engine.backward(loss)
    engine.step()
    with torch.no_grad():
        after = engine(tokens, labels=tokens).loss.item()
    assert abs(loss.item() - expected) < 1e-4 and after < expected - 0.01
    return f"loss {loss.item():.4f}, without DeepSpeed {expected:.4f}; after a step {after:.4f}"


version, result = transformers.__version__, step()
if rank == 0:
    print(f"transformers {version}: {result}")
replaced = {type(layer.mlp).__name__ for layer in model.model.layers}
assert replaced == {"AutoEPMoELayer"}, replaced
assert result.startswith("TypeError" if version == "5.23.0" else "loss"), "another version of transformers fails now"
dist.destroy_process_group()
END

export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1
for beside in "" new; do
    PYTHONPATH=$beside venv/bin/torchrun --standalone --nproc-per-node 2 rank.py > out 2> log ||
        { cat out log >&2; exit 1; }
    grep "^transformers" out
done
