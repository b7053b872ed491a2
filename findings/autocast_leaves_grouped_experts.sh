#!/usr/bin/env bash
# Under autocast, transformers computes experts in fp32 by default; other implementations of the experts use bf16.
#
# Expected: Under torch.autocast(dtype=bfloat16), all large matrix products of an fp32 model run in bf16, and the
# implementation of the experts affects only speed.
# Observed: autocast has no rule for torch.nn.functional.grouped_mm, which transformers 5 uses for experts by default.
# Attention and router run in bf16, but every expert runs in fp32, with the speed and memory of fp32. The other
# implementations ("eager", "batched_mm") run experts in bf16. The implementation changes precision and loss.
#
# Seen with torch 2.13.0, transformers 5.24.0 (Mixtral, on a CPU):
#   eager:      experts in bfloat16, all other products in bfloat16
#   batched_mm: experts in bfloat16, all other products in bfloat16
#   grouped_mm: experts in float32, all other products in bfloat16 (the default)
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install -qq torch==2.13.0
venv/bin/python -m pip install -qq transformers==5.24.0

venv/bin/python -I - <<'END'
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralExperts


class Products(TorchDispatchMode):
    """Notes the type of every matrix product, apart for those inside the experts."""

    def __init__(self):
        super().__init__()
        self.in_experts, self.experts, self.others = False, set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "mm" in func.__name__:
            (self.experts if self.in_experts else self.others).add(str(args[0].dtype).removeprefix("torch."))
        return func(*args, **(kwargs or {}))


config = MixtralConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
)
torch.manual_seed(0)
model = MixtralForCausalLM(config)
default = model.config._experts_implementation
tokens = torch.randint(64, (2, 16))
modules = [module for module in model.modules() if isinstance(module, MixtralExperts)]

seen = {}
for way in ("eager", "batched_mm", "grouped_mm"):
    model.set_experts_implementation(way)
    products = Products()
    hooks = [m.register_forward_pre_hook(lambda *_: setattr(products, "in_experts", True)) for m in modules]
    hooks += [m.register_forward_hook(lambda *_: setattr(products, "in_experts", False)) for m in modules]
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), products:
        model(tokens)
    for hook in hooks:
        hook.remove()
    seen[way] = (products.experts, products.others)
    print(
        f"{way + ':':11} experts in {', '.join(products.experts)}, all other products in {', '.join(products.others)}"
        f"{' (the default)' if way == default else ''}"
    )
assert default == "grouped_mm", "another implementation is the default"
assert seen["eager"] == seen["batched_mm"] == ({"bfloat16"}, {"bfloat16"}), "these two were wholly in bf16"
assert seen["grouped_mm"] == ({"float32"}, {"bfloat16"}), "the grouped product follows autocast now"
END
