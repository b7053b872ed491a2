"""The way of a checkpoint's tensors into the plain model."""

from __future__ import annotations

import torch

from dynmoe.errors import UserError, some
from dynmoe.hf import qwen2_moe
from dynmoe.hf.names import STACKED, parts
from dynmoe.hf.tensors import FLOATS, Tensors
from dynmoe.model import Decoder

# Families whose experts have tensors of their own, except in a state_dict of transformers 5.
_BY_EXPERT = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
_MASK = ("dynmoe", "BOOL", "active")  # of the experts in use


@torch.no_grad()
def fill(decoder: Decoder, tensors: Tensors, maker: str) -> None:
    """Puts the tensors of a checkpoint of ``maker`` into their places.

    Raises:
        UserError: what is missing, surplus, of another shape, quantized, not finite or not zeros, where nothing else
            can be computed, each by name.
    """
    kinds, model = tensors.kinds(), decoder.settings
    zeros, halved = {}, []
    if maker == "qwen2_moe":
        zeros, halved = qwen2_moe.zeros_in(model, tensors), qwen2_moe.down_projections(model)
    if maker in _BY_EXPERT and any(name.endswith(".experts.gate_up_proj") for name in kinds):
        maker = STACKED
    wanted = list(parts(model, decoder.w_embed_VD.shape[0], maker))
    quantized = [
        f"{name} is {kind}"
        for name, kind in sorted(kinds.items())
        if kind not in FLOATS and (maker, kind, name.rpartition(".")[2]) != _MASK
    ]
    if quantized:
        cure = "quantized weights are not read: save them in bf16 or fp32 first"
        raise UserError(f"{tensors.source}: {some(quantized)}; {cure}")
    shapes = {name: shape for part in wanted for name, shape in part.shapes.items()}
    _check_shapes(tensors, shapes | zeros, model.tie_embeddings)
    qwen2_moe.check_zeros(tensors, zeros)
    own = {**dict(decoder.named_parameters()), **dict(decoder.named_buffers())}
    for part in wanted:
        place = own[part.ours] if part.expert is None else own[part.ours][part.expert]
        for name, rows in zip(part.theirs, place.split(part.rows) if part.rows else [place], strict=True):
            rows.copy_(tensors.read(name))
            if name in halved:
                rows.mul_(qwen2_moe.GATE_OF_ZEROS)


def _check_shapes(tensors: Tensors, wanted: dict[str, tuple[int, ...]], tied: bool) -> None:
    found = {name: shape for name, shape in tensors.shapes().items() if not name.endswith("rotary_emb.inv_freq")}
    output, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if tied and output in found and embedding in found and torch.equal(tensors.read(output), tensors.read(embedding)):
        del found[output]  # written twice
    missing, surplus = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    problems = [f"missing: {some(missing)}"] if missing else []
    problems += [f"surplus: {some(surplus)}"] if surplus else []
    shapes = [
        f"{name} has shape {found[name]} where {shape} is wanted"
        for name, shape in sorted(wanted.items())
        if name in found and found[name] != shape
    ]
    if shapes:
        problems.append(some(shapes))
    if problems:
        raise UserError(f"{tensors.source}: its tensors do not fit config.json; {'; '.join(problems)}")
