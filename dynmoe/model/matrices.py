"""Which matrices the weights of the model hold."""

from __future__ import annotations

from dynmoe.config import ModelConfig


def rows_of_matrices(model: ModelConfig, name: str, rows: int) -> tuple[int, ...]:
    """Numbers of rows of the matrices that a weight, or one expert's, holds one below the other.

    Args:
        model: configuration of the model.
        name: of the weight in :class:`dynmoe.model.Decoder`.
        rows: of the whole weight.
    """
    last = name.rpartition(".")[2]
    if last == "w_qkv":
        size = model.width_of_head
        return model.heads * size, model.kv_heads * size, model.kv_heads * size
    if last.startswith("w_up_"):  # gate and up projection
        return rows // 2, rows // 2
    return (rows,)
