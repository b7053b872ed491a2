"""The decoder as Megatron-Core's HybridModel, which replaces GPTModel from 0.18 on.

Each symbol of the layer pattern is one transformer layer, attention and feed-forward part together. Layer numbers and
checkpoint names therefore do not depend on the Megatron-Core version.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.core.dist_checkpointing.utils import apply_prefix_mapping
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig


def hybrid_model(
    config: TransformerConfig, layer_spec: Callable[[int], ModuleSpec], norm: type, **settings: Any
) -> HybridModel:
    """Builds this rank's model chunk; see :func:`dynmoe.engines.megatron.versions.build_decoder`."""
    parts = config.pipeline_model_parallel_size * (config.virtual_pipeline_model_parallel_size or 1)
    pattern = Symbols.PIPE.join([Symbols.ATTENTION * (config.num_layers // parts)] * parts)
    layers = HybridStackSubmodules(attention_layer=ModuleSpec(module=_Layer, params={"layer_spec": layer_spec}))
    stack = ModuleSpec(module=_Stack, params={"norm": norm}, submodules=layers)
    return HybridModel(config, stack, hybrid_layer_pattern=pattern, **settings)


class _Layer:
    """Builds the layer with the given number from its own spec."""

    def __new__(cls, layer_spec: Callable[[int], ModuleSpec], layer_number: int, **settings: Any) -> Any:
        return build_module(layer_spec(layer_number - 1), layer_number=layer_number, **settings)


class _Stack(HybridStack):
    """A stack with a configurable final norm; the stock one needs Transformer Engine."""

    def __init__(self, config: TransformerConfig, *, norm: type, **settings: Any) -> None:
        super().__init__(config, post_layer_norm=False, **settings)
        self.post_layer_norm = True
        if self.post_process:
            self.final_norm = norm(config, config.hidden_size, config.layernorm_epsilon)

    def sharded_state_dict(self, prefix: str = "", *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Uses the names of GPTModel."""
        state = super().sharded_state_dict(prefix, *args, **kwargs)
        apply_prefix_mapping(state, {f"{prefix}final_norm.": f"{prefix}final_layernorm."})
        return state
