"""Where gradients of weights are summed over forward passes, so that a backward pass can add to them in place."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge


def gradient_sum(weight: Tensor) -> Tensor | None:
    """The tensor to which the running backward pass may add the gradient of ``weight``; it then returns None for it.

    Otherwise autograd adds a second tensor of the same size, and with many experts that is the peak of memory. The sum
    is ``weight.grad`` from the second pass of a step on. It is ``weight.main_grad``, the fp32 buffer of Megatron-Core,
    if the engine sets ``weight.adds_to_main_grad``.

    Returns:
        None if the gradient itself is needed: in the first pass, for hooks of the weight, and in ``autograd.grad``.
        Hooks of the node that accumulates the gradient are not seen; they are called with None.
    """
    if not weight.is_leaf or weight._backward_hooks or not _accumulates(weight):
        return None
    name = "main_grad" if getattr(weight, "adds_to_main_grad", False) else "grad"
    total: Tensor | None = getattr(weight, name)
    return total if total is not None and total.is_contiguous() else None


def _accumulates(leaf: Tensor) -> bool:
    """Whether the running backward pass ends with a sum for this leaf.

    It does not in ``autograd.grad``, nor in ``backward(inputs=...)`` without this leaf.
    """
    try:
        # The function behind torch.autograd.graph.register_multi_grad_hook.
        return torch._C._will_engine_execute_node(get_gradient_edge(leaf).node)
    except RuntimeError:  # in autograd.grad with this leaf as an input, or for a leaf without a gradient
        return False
