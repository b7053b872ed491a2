"""Parts of Qwen2-MoE that a decoder of ours may lack: biases of queries, keys and values, and a gated shared expert.

An export writes what is missing without effect, and an import takes it for missing:

- biases of zeros, because vLLM creates biases whatever ``qkv_bias`` says and leaves missing ones uninitialized; others
  cannot be imported;
- without a gate, one of zeros, whose sigmoid halves the shared expert, with a down projection that is doubled;
- without a shared expert, one with zero weights, because neither vLLM nor mlx-lm supports a width of 0.
"""

from __future__ import annotations

from dynmoe.config import ModelConfig
from dynmoe.errors import UserError, some
from dynmoe.hf.tensors import Tensors

# Width of a zero shared expert: divisible for tensor parallelism, and one block of llama.cpp's quantized formats.
ABSENT_WIDTH = 32
GATE_OF_ZEROS = 0.5
_EXPERT = ("gate_proj", "up_proj", "down_proj")


def zeros(model: ModelConfig, biased: bool = True, absent_width: int = ABSENT_WIDTH) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all zero tensors in a Qwen2-MoE checkpoint of ``model``.

    Args:
        model: our configuration.
        biased: whether the checkpoint has biases.
        absent_width: width of the zero shared expert, if ``model`` has no shared expert.
    """
    hidden = model.hidden
    shapes: dict[str, tuple[int, ...]] = {}
    rows = {"q": model.heads, "k": model.kv_heads, "v": model.kv_heads} if biased else {}
    for layer in range(model.layers):
        for name, heads in rows.items():
            shapes[f"model.layers.{layer}.self_attn.{name}_proj.bias"] = (heads * model.width_of_head,)
        if not model.is_moe_layer(layer):
            continue
        if not model.moe.shared_gate:
            shapes[_gate(layer)] = (1, hidden)
        if not model.moe.shared_hidden:
            widths = (absent_width, hidden), (absent_width, hidden), (hidden, absent_width)
            shapes |= {f"{_shared(layer)}.{part}.weight": shape for part, shape in zip(_EXPERT, widths, strict=True)}
    return shapes


def zeros_in(model: ModelConfig, tensors: Tensors) -> dict[str, tuple[int, ...]]:
    """The same for an existing checkpoint, with its width and with biases only if it has them.

    Missing biases are zeros in transformers too, whatever ``qkv_bias`` says.
    """
    shapes = tensors.shapes()
    biased = any(name.endswith("_proj.bias") for name in shapes)
    first = shapes.get(f"{_shared(model.moe_layers[0])}.up_proj.weight") or (ABSENT_WIDTH,)
    return zeros(model, biased, first[0])


def check_zeros(tensors: Tensors, names: dict[str, tuple[int, ...]]) -> None:
    """Checks that all these tensors are zeros.

    Raises:
        UserError: some are not; the error names them.
    """
    wrong = [name for name in names if not tensors.are_zeros(name)]
    if wrong:
        raise UserError(
            f"{tensors.source}: not zeros: {some(wrong)}; our decoder has no biases, and no gate without a shared "
            "expert. Fine-tune the export again with them frozen: requires_grad_(False)"
        )


def has_shared_expert(tensors: Tensors) -> bool:
    """Whether a checkpoint has a shared expert with nonzero weights; an expert of zeros could not learn either."""
    return not all(tensors.are_zeros(name) for name in tensors.shapes() if ".mlp.shared_expert." in name)


def has_gates(tensors: Tensors) -> bool:
    """Whether a checkpoint has nonzero gates of shared experts; gates of zeros are those that an export adds."""
    return not all(tensors.are_zeros(name) for name in tensors.shapes() if ".mlp.shared_expert_gate." in name)


def down_projections(model: ModelConfig) -> list[str]:
    """Names of the projections that are doubled to compensate for the gate."""
    layers = model.moe_layers if model.moe.shared_hidden and not model.moe.shared_gate else []
    return [f"{_shared(layer)}.down_proj.weight" for layer in layers]


def _shared(layer: int) -> str:
    return f"model.layers.{layer}.mlp.shared_expert"


def _gate(layer: int) -> str:
    return f"{_shared(layer)}_gate.weight"
