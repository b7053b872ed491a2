"""DynMoE in transformers 5: each token takes a dynamic number of experts. This file ships with the weights.

Shape letters: B sequences, S new tokens of each, P all positions so far, T = B * S, D model dimension, H query heads,
K key-value heads, d head width, E experts, F expert width.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    MoeCausalLMOutputWithPast,
    MoeModelOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.utils import can_return_tuple
from transformers.utils.deprecation import deprecate_kwarg

from dynmoe.hf.attention_dynmoe import DynMoEAttention
from dynmoe.hf.configuration_dynmoe import DynMoEConfig, tensor_parallel_plan
from dynmoe.hf.moe_dynmoe import DynMoEBlock, DynMoEExperts, DynMoEMLP, DynMoERouter, router_buffers
from dynmoe.hf.serving_dynmoe import ExpertsHost  # noqa: F401 (transformers 5.6 copies only files imported here)
from dynmoe.ops.opaque import opaque_experts  # noqa: F401
from dynmoe.routers.base import without_shape
from dynmoe.routing import RoutingPlan  # noqa: F401

# transformers 5.x renamed the cache argument and field.
_MASK_ARGUMENTS = inspect.signature(create_causal_mask).parameters
_CACHE = "cache" if "cache" in _MASK_ARGUMENTS else "past_key_values"
_accepts_old_name = (
    deprecate_kwarg("past_key_values", "5.40.0", new_name="cache") if _CACHE == "cache" else lambda forward: forward
)


class DynMoEDecoderLayer(GradientCheckpointingLayer):
    """Attention and feed-forward, each after an RMSNorm and added to the residual stream."""

    def __init__(self, config: DynMoEConfig, layer: int) -> None:
        super().__init__()
        experts = config.layer_experts[layer]
        self.self_attn = DynMoEAttention(config, layer)
        self.mlp = DynMoEBlock(config, experts) if experts else DynMoEMLP(config, config.intermediate_size)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x_BSD: Tensor, angles: tuple[Tensor, Tensor], mask: Any, counted_T: Tensor | None, wanted: bool,
        cache: Any = None, **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:  # fmt: skip
        """Returns the output, the attention weights if computed, and, if ``wanted``, the router's outputs."""
        attended, weights = self.self_attn(self.input_layernorm(x_BSD), angles, mask, cache, **kwargs)
        x_BSD = x_BSD + attended
        normed_BSD = self.post_attention_layernorm(x_BSD)
        if isinstance(self.mlp, DynMoEMLP):
            return x_BSD + self.mlp(normed_BSD), weights, ()
        y_BSD, routing = self.mlp(normed_BSD, counted_T, wanted)
        return x_BSD + y_BSD, weights, routing


@dataclass
class DynMoEModelOutput(MoeModelOutputWithPast):
    """Outputs with ``output_router_logits``, for the MoE layers in order, including padding.

    Attributes:
        router_logits: logits of each layer, [B, S, E]; null experts come last, inactive ones have -inf.
        routing_maps: routing map of each layer, [B, S, E]: True if the expert processes the token.
        experts_per_token: number of experts, [layers, B, S].
        aux_loss: the routers' losses, times their coefficients, summed over layers, excluding padding.
    """

    routing_maps: tuple[Tensor, ...] | None = None
    experts_per_token: Tensor | None = None
    aux_loss: Tensor | None = None


@dataclass
class DynMoECausalLMOutput(MoeCausalLMOutputWithPast):
    """See :class:`DynMoEModelOutput`."""

    routing_maps: tuple[Tensor, ...] | None = None
    experts_per_token: Tensor | None = None


@dataclass
class DynMoESequenceClassifierOutput(SequenceClassifierOutputWithPast):
    """See :class:`DynMoEModelOutput`."""

    router_logits: tuple[Tensor, ...] | None = None
    routing_maps: tuple[Tensor, ...] | None = None
    experts_per_token: Tensor | None = None
    aux_loss: Tensor | None = None


_SHARED = ("hidden_states", "attentions", "router_logits", "routing_maps", "experts_per_token", "aux_loss")


class DynMoEPreTrainedModel(PreTrainedModel):
    config_class = DynMoEConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DynMoEDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["cache", "past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: DynMoEConfig) -> None:
        config.check_overrides()
        if config._attn_implementation == "vllm":  # attention of local heads only, see ``ProjectionNorm``
            config.base_model_tp_plan = tensor_parallel_plan(config, gathers=False)
        super().__init__(config)
        state = router_buffers(config, 1) if any(config.layer_experts) else {}
        # bf16 would change the thresholds.
        self._keep_in_fp32_modules_strict = {f"router.{without_shape(name)}" for name in state}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, DynMoEExperts):
            init.normal_(module.gate_up_proj, std=std)
            init.normal_(module.down_proj, std=std)
        elif isinstance(module, DynMoERouter):
            for name, tensor in module.initial.items():
                own = getattr(module, name)
                init.normal_(own, std=std) if tensor.initial is None else init.constant_(own, tensor.initial)
        elif isinstance(module, DynMoEBlock) and module.counts_2 is not None:
            init.zeros_(module.counts_2)


class DynMoEModel(DynMoEPreTrainedModel):
    def __init__(self, config: DynMoEConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([DynMoEDecoderLayer(config, n) for n in range(config.num_hidden_layers)])
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
        # Servers that scale positions expect Llama's methods.
        self.scaled_rotary = None if kind == "default" else LlamaRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @property
    def expert_counts(self) -> list[list[int]]:
        """Number of tokens so far and of their experts, for each MoE layer; synchronizes with the device.

        Raises:
            ValueError: ``config.count_experts`` is off.
        """
        blocks = [layer.mlp for layer in self.layers if isinstance(layer.mlp, DynMoEBlock)]
        counts = [block.counts_2.tolist() for block in blocks if block.counts_2 is not None]
        if len(counts) < len(blocks):
            raise ValueError("count_experts=False: experts are not counted; load the model with count_experts=True")
        return counts

    def _angles(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the rotary positions, fp32 [B, S, d]."""
        if self.scaled_rotary is not None:
            cos, sin = self.scaled_rotary(self.norm.weight.float(), position_ids)
            return cos, sin
        width = self.config.head_dim
        device = position_ids.device
        frequency = self.config.rope_theta ** (-torch.arange(0, width, 2, dtype=torch.float32, device=device) / width)
        angle = position_ids[..., None].float() * frequency
        angle = torch.cat([angle, angle], dim=-1)
        return angle.cos(), angle.sin()

    @_accepts_old_name
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_router_logits: bool | None = None,
        **kwargs: Any,
    ) -> DynMoEModelOutput:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids, inputs_embeds: pass exactly one of them")
        x_BSD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        config = self.config
        cache = past_key_values if cache is None else cache
        wanted = config.output_router_logits if output_router_logits is None else output_router_logits
        keeps = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        attends = config.output_attentions if output_attentions is None else output_attentions
        replays = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        if cache is None and (config.use_cache if use_cache is None else use_cache) and not replays:
            cache = DynamicCache(config=config)
        before = cache.get_seq_length() if cache is not None else 0
        positions = x_BSD.shape[1]
        if position_ids is None:
            position_ids = torch.arange(before, before + positions, device=x_BSD.device).unsqueeze(0)
        extra: Any = {_CACHE: cache, "position_ids": position_ids}
        if "cache_position" in _MASK_ARGUMENTS:
            extra["cache_position"] = torch.arange(before, before + positions, device=x_BSD.device)
        makers = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
        masks = {kind: makers[kind](config, x_BSD, attention_mask, **extra) for kind in set(config.layer_types)}
        counted_T = None
        if (wanted or config.count_experts) and attention_mask is not None and attention_mask.dim() == 2:
            counted_T = attention_mask[:, -positions:].bool().flatten()
        angles = self._angles(position_ids)
        states = []
        all_weights = []
        all_routing = []
        for layer, kind in zip(self.layers, config.layer_types, strict=True):
            if keeps:
                states.append(x_BSD)
            # FlashAttention finds the documents of a flattened batch by its positions.
            x_BSD, weights, routing = layer(
                x_BSD, angles, masks[kind], counted_T, wanted, cache=cache, position_ids=position_ids, **kwargs
            )
            if attends:
                all_weights.append(weights)
            if routing:
                all_routing.append(routing)
        x_BSD = self.norm(x_BSD)
        losses, logits, maps = zip(*all_routing, strict=True) if all_routing else ((), (), ())
        return DynMoEModelOutput(
            last_hidden_state=x_BSD,
            hidden_states=(*states, x_BSD) if keeps else None,
            attentions=tuple(all_weights) if attends else None,
            router_logits=logits or None,
            routing_maps=maps or None,
            # Layers may be on different devices.
            experts_per_token=torch.stack([m.sum(dim=-1).to(x_BSD.device) for m in maps]) if maps else None,
            aux_loss=torch.stack([loss.to(x_BSD.device) for loss in losses]).sum() if losses else None,
            **{_CACHE: cache},
        )


class DynMoEForCausalLM(DynMoEPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012

    def __init__(self, config: DynMoEConfig) -> None:
        super().__init__(config)
        self.model = DynMoEModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @_accepts_old_name
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> DynMoECausalLMOutput:
        """Computes the logits of the last ``logits_to_keep`` positions (0: all) and, with labels, the loss."""
        out: DynMoEModelOutput = self.model(
            input_ids, attention_mask, position_ids, past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds, use_cache=use_cache, output_router_logits=output_router_logits, **kwargs,
        )  # fmt: skip
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.vocab_size, **kwargs)
            if out.aux_loss is not None:
                share = _share_of_step(labels, **kwargs).to(loss.device)
                loss = loss + share * out.aux_loss.to(loss.device)
        return DynMoECausalLMOutput(loss=loss, logits=logits, **{name: out.get(name) for name in (*_SHARED, _CACHE)})


def _share_of_step(
    labels: Tensor, num_items_in_batch: Tensor | int | None = None, shift_labels: Tensor | None = None, **kwargs: Any
) -> Tensor:
    """The share of an optimizer step's predicted labels that is in this forward pass; 1 if Trainer did not count them.

    Trainer adds up the losses of a step's passes. The cross-entropy has its share already, by ``num_items_in_batch``.
    """
    if num_items_in_batch is None:
        return torch.ones(())
    predicted = labels[..., 1:] if shift_labels is None else shift_labels
    return (predicted != -100).sum() / torch.as_tensor(num_items_in_batch, device=predicted.device)


class DynMoEForSequenceClassification(DynMoEPreTrainedModel):
    """A linear head on the last non-padding token."""

    # The loss is a mean over the pass, so Trainer must divide it by the number of passes of a step.
    accepts_loss_kwargs = False

    def __init__(self, config: DynMoEConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = DynMoEModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> DynMoESequenceClassifierOutput:
        kwargs["use_cache"] = False
        out: DynMoEModelOutput = self.model(input_ids, attention_mask, inputs_embeds=inputs_embeds, **kwargs)
        states_BSD = out.last_hidden_state
        last_B = torch.full((len(states_BSD),), states_BSD.shape[1] - 1, device=states_BSD.device)
        if attention_mask is not None:
            places_S = torch.arange(states_BSD.shape[1], device=states_BSD.device)
            last_B = (attention_mask.to(places_S.device) * places_S).argmax(dim=1)
        logits = self.score(states_BSD[torch.arange(len(states_BSD), device=states_BSD.device), last_B])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
            if out.aux_loss is not None:
                loss = loss + out.aux_loss.to(loss.device)
        return DynMoESequenceClassifierOutput(loss=loss, logits=logits, **{name: out.get(name) for name in _SHARED})
