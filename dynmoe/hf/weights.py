"""Loading of a checkpoint's tensors into our decoder."""

from __future__ import annotations

from collections.abc import Collection

import torch

from dynmoe.errors import UserError, some
from dynmoe.hf import deepseek_v3, longcat, qwen2_moe
from dynmoe.hf.names import STACKED, STACKED_DEEPSEEK, STACKED_LONGCAT, parts
from dynmoe.hf.tensors import FLOATS, Tensors
from dynmoe.model import Decoder
from dynmoe.model.rotary import halves

# Families that store each expert in its own tensors, with the names in a state_dict of transformers 5, which does not.
_BY_EXPERT = {
    **dict.fromkeys(("mixtral", "olmoe", "qwen2_moe", "qwen3_moe"), STACKED),
    "deepseek_v3": STACKED_DEEPSEEK,
    "longcat_flash": STACKED_LONGCAT,
}
_MASK = ("dynmoe", "BOOL", "active")  # the mask of active experts


@torch.no_grad()
def load_weights(decoder: Decoder, tensors: Tensors, architecture: str, interleaved: bool = True) -> None:
    """Copies the tensors of a checkpoint of ``architecture`` into ``decoder``.

    Layers that predict further tokens are left out if the decoder has none (:func:`prediction_tensors`), and what
    identity experts do not read.

    Args:
        decoder: the model to fill.
        tensors: the checkpoint.
        architecture: its family.
        interleaved: whether its latent attention rotates neighbouring rows together.

    Raises:
        UserError: tensors are missing, unexpected, misshapen, quantized, not finite, or not zeros although our decoder
            requires it; the error names them.
    """
    kinds = tensors.kinds()
    model = decoder.settings
    is_qwen2 = architecture == "qwen2_moe"
    zeros = qwen2_moe.zeros_in(model, tensors) if is_qwen2 else {}
    doubled = qwen2_moe.down_projections(model) if is_qwen2 else []
    left_out = prediction_tensors(architecture, kinds, model.trained_layers)
    if architecture == "longcat_flash":
        left_out += longcat.unread_projections(model)
    if architecture in _BY_EXPERT and any(name.endswith(".experts.gate_up_proj") for name in kinds):
        architecture = _BY_EXPERT[architecture]
    known = parts(model, decoder.w_embed_VD.shape[0], architecture)
    wanted = [part for part in known if not part.again or part.theirs[0] in kinds]
    wanted.sort(key=lambda part: part.again)  # copies are compared with what is then loaded
    quantized = [
        f"{name} is {kind}"
        for name, kind in sorted(kinds.items())
        if kind not in FLOATS and (architecture, kind, name.rpartition(".")[2]) != _MASK
    ]
    if quantized:
        cure = "quantized weights are not supported; save them in bf16 or fp32 first"
        raise UserError(f"{tensors.source}: {some(quantized)}; {cure}")
    shapes = {name: shape for part in wanted for name, shape in part.shapes.items()}
    _check_shapes(tensors, shapes | zeros, left_out, model.tie_embeddings)
    qwen2_moe.check_zeros(tensors, zeros)
    own = {**dict(decoder.named_parameters()), **dict(decoder.named_buffers())}
    for part in wanted:
        place = own[part.ours] if part.expert is None else own[part.ours][part.expert]
        for name, rows in zip(part.theirs, place.split(part.rows) if part.rows else [place], strict=True):
            value = tensors.read(name)
            value = value[: len(rows)] if part.unread else value
            if part.again and not torch.equal(value.to(rows.dtype), rows):
                problem = f"{name} differs from that of the model, which our layers share"
                raise UserError(f"{tensors.source}: {problem}; import it without model.mtp.layers")
            rows.copy_(halves(value, *part.rotated) if part.rotated and interleaved else value)
            if name in doubled:
                rows.mul_(qwen2_moe.GATE_OF_ZEROS)


def prediction_tensors(architecture: str, names: Collection[str], layers: int) -> list[str]:
    """Tensors of layers that predict further tokens, behind the last of ``layers``."""
    if architecture == "deepseek_v3":
        return deepseek_v3.prediction_tensors(names, layers)
    return longcat.prediction_tensors(names) if architecture == "longcat_flash" else []


def _check_shapes(tensors: Tensors, wanted: dict[str, tuple[int, ...]], left_out: Collection[str], tied: bool) -> None:
    shapes = tensors.shapes()
    found = {name: shapes[name] for name in shapes.keys() - left_out if not name.endswith("rotary_emb.inv_freq")}
    output = "lm_head.weight"
    embedding = "model.embed_tokens.weight"
    if tied and output in found and embedding in found and torch.equal(tensors.read(output), tensors.read(embedding)):
        del found[output]  # a redundant copy
    wrong = {
        "missing": sorted(wanted.keys() - found.keys()),
        "unexpected": sorted(found.keys() - wanted.keys()),
        "wrong shape": [
            f"{name} has {found[name]}, must have {shape}"
            for name, shape in sorted(wanted.items())
            if found.get(name, shape) != shape
        ],
    }
    problems = [f"{problem}: {some(names)}" for problem, names in wrong.items() if names]
    if problems:
        raise UserError(f"{tensors.source}: tensors do not match config.json; {'; '.join(problems)}")
