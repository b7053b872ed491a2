"""What Qwen2-MoE has and our decoder lacks: biases of queries, keys and values, and a shared expert with a gate.

An export writes them so that they change nothing, and in no other way are they imported:

- biases of zeros, as vLLM makes them whatever ``qkv_bias`` says, and leaves them as the memory was;
- a gate of zeros, whose sigmoid halves the shared expert: its down projection is doubled;
- where there is no shared expert one whose weights are zeros, as neither vLLM nor mlx-lm reads one of width 0.
"""

from __future__ import annotations

from dynmoe.config import ModelConfig
from dynmoe.errors import UserError, some
from dynmoe.hf.tensors import Tensors

# Of a shared expert that is none: tensor parallelism divides it, and formats of llama.cpp quantize 32 weights together.
ABSENT_WIDTH = 32
GATE_OF_ZEROS = 0.5
_EXPERT = ("gate_proj", "up_proj", "down_proj")


def zeros(model: ModelConfig, biased: bool = True, absent_width: int = ABSENT_WIDTH) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors that are zeros in a checkpoint of Qwen2-MoE.

    Args:
        model: ours.
        biased: whether the checkpoint has biases.
        absent_width: of the shared expert that it has where ``model`` has none.
    """
    hidden, shapes = model.hidden, dict[str, tuple[int, ...]]()
    rows = {"q": model.heads, "k": model.kv_heads, "v": model.kv_heads} if biased else {}
    for layer in range(model.layers):
        for name, heads in rows.items():
            shapes[f"model.layers.{layer}.self_attn.{name}_proj.bias"] = (heads * model.width_of_head,)
        if not model.is_moe_layer(layer):
            continue
        shapes[f"model.layers.{layer}.mlp.shared_expert_gate.weight"] = (1, hidden)
        if not model.moe.shared_hidden:
            widths = (absent_width, hidden), (absent_width, hidden), (hidden, absent_width)
            shapes |= {f"{_shared(layer)}.{part}.weight": shape for part, shape in zip(_EXPERT, widths, strict=True)}
    return shapes


def zeros_in(model: ModelConfig, tensors: Tensors) -> dict[str, tuple[int, ...]]:
    """The same for one checkpoint, with biases or not and of the width that it has.

    Biases that the file lacks are zeros in transformers too, whatever ``qkv_bias`` says.
    """
    shapes = tensors.shapes()
    biased = any(name.endswith("_proj.bias") for name in shapes)
    first = shapes.get(f"{_shared(model.moe_layers[0])}.up_proj.weight") or (ABSENT_WIDTH,)
    return zeros(model, biased, first[0])


def check_zeros(tensors: Tensors, names: dict[str, tuple[int, ...]]) -> None:
    """Refuses biases, gates and absent experts that do say something.

    Raises:
        UserError: their names.
    """
    wrong = [name for name in names if not tensors.are_zeros(name)]
    if wrong:
        raise UserError(
            f"{tensors.source}: not zeros: {some(wrong)}; our decoder has neither biases nor gates of shared experts. "
            "Where it was an export that was fine-tuned, do that again with them frozen: requires_grad_(False)"
        )


def has_shared_expert(tensors: Tensors) -> bool:
    """Whether a checkpoint has a shared expert whose weights are not zeros; such a one cannot learn either."""
    return not all(tensors.are_zeros(name) for name in tensors.shapes() if ".mlp.shared_expert." in name)


def down_projections(model: ModelConfig) -> list[str]:
    """Names of what the gate of zeros halves."""
    layers = model.moe_layers if model.moe.shared_hidden else []
    return [f"{_shared(layer)}.down_proj.weight" for layer in layers]


def _shared(layer: int) -> str:
    return f"model.layers.{layer}.mlp.shared_expert"
