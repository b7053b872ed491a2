"""Makes exports and what transformers computes of them; export_* beside this file were made so at commit e73c852.

    python -m tests.golden.make_exports FOLDER

Exports of that code are to be read for ever: run it there again, not with the code of today.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from data_prep.build import build
from data_prep.recipe import Recipe
from dynmoe.hf.export import export
from tests.hf.cases import begin, some_tokens
from tests.texts import write_texts

# The plainest one, and one that has all there is: offsets, masked experts and a trained temperature too.
RUNS = {
    "export_top_p": ["model.router.kind=top_p", "model.router.p=0.6"],
    "export_top_any": [
        "model.router.kind=top_any", "model.router.variant=improved", "model.router.temperature=learned",
        "model.router.min_experts=0", "model.router.max_experts=3", "model.router.balance_loss=0.02",
        "model.router.efficiency_loss=1e-3", "model.qk_norm=projection", "model.head_dim=12", "model.rope_theta=500",
        "model.tie_embeddings=true", "model.moe.moe_layer_freq=2", "model.moe.experts=6", "model.moe.active_at_start=5",
        "model.moe.shared_hidden=16",
    ],
}  # fmt: skip


def main(folder: Path) -> None:
    write_texts(folder / "text", documents=60)
    build(Recipe([str(folder / "text")], vocab_size=400, validation_fraction=0.2), folder / "corpus", workers=1)
    for name, fields in RUNS.items():
        run = begin(folder / "corpus", folder / f"run_{name}", fields)
        export(run.path, folder / name)
        model = AutoModelForCausalLM.from_pretrained(folder / name, trust_remote_code=True).eval()
        with torch.no_grad():
            out = model(some_tokens(), output_router_logits=True)
        found = {"logits": out.logits, "experts_per_token": out.experts_per_token, "aux_loss": out.aux_loss}
        save_file({"input_ids": some_tokens(), **found}, folder / name / "expected.safetensors")
        (folder / name / "expected.safetensors").chmod(0o644)
        (folder / name / "model.safetensors").chmod(0o644)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
