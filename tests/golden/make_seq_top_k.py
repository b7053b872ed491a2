"""Computes routing of whole sequences by the code of Megatron-LM's pull request 6208.

    python tests/golden/make_seq_top_k.py SEQ_TOPK.PY OUT.safetensors

The first argument is ``megatron/core/transformer/moe/seq_topk.py`` of NVIDIA/Megatron-LM at commit
b7e580f09afa12abf422d000ffdd534525b695d9. Its last conversion passes a dtype to ``type_as``, which raises a TypeError;
here it becomes ``to``, and nothing else changes.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

SHA256 = "4e3d38379210961611b7438c2f0d1c19a3abdd03d9816aeec8b3d7fa5b0c9fec"
# Sequences, tokens of each, experts, K, maximum for a token.
CASES = [(1, 8, 4, 1, 4), (2, 16, 8, 2, 8), (3, 32, 16, 2, 4), (2, 24, 8, 3, 3), (4, 20, 32, 4, 6)]


def main(source: Path, out: Path) -> None:
    text = source.read_text()
    assert hashlib.sha256(text.encode()).hexdigest() == SHA256
    code: dict = {}
    exec(text.replace("probs.type_as(orig_dtype)", "probs.to(orig_dtype)"), code)
    tensors = {}
    for number, (sequences, length, experts, k, most) in enumerate(CASES):
        generator = torch.Generator().manual_seed(number)
        logits = (2 * torch.randn(sequences * length, experts, generator=generator)).requires_grad_()
        upstream = torch.randn(logits.shape, generator=generator)
        lengths = torch.arange(sequences + 1) * length
        owner = code["build_seq_idx"](lengths, len(logits), logits.device)
        weights, routing = code["seqtopk_routing"](logits, k, most, owner, use_pre_softmax=True)
        (weights * upstream).sum().backward()
        found = {"logits": logits, "upstream": upstream, "weights": weights, "routing": routing, "grad": logits.grad}
        found |= {"sequences": torch.tensor(sequences), "k": torch.tensor(k), "most": torch.tensor(most)}
        tensors |= {f"case{number}.{name}": value.detach().contiguous() for name, value in found.items()}
    save_file(tensors, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
