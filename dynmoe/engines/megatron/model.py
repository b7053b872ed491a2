"""The model as Megatron-Core modules, with our MoE layer in place of Megatron's."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.module import Float16Module, MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.utils import make_sharded_tensor_for_checkpoint
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dynmoe.config import Config, ModelConfig
from dynmoe.engines.megatron.attention import BiasedOutput, CoreAttention, DocumentRotaryEmbedding, QKNormAttention
from dynmoe.engines.megatron.latent_attention import LatentSelfAttention
from dynmoe.engines.megatron.multi_token import MultiTokenPrediction
from dynmoe.engines.megatron.norms import RMSNorm
from dynmoe.engines.megatron.versions import build_decoder
from dynmoe.engines.megatron.weights import initialize, moe_layer
from dynmoe.model.rotary import frequencies
from dynmoe.moe import MoEContext, MoELayer


def transformer_config(config: Config) -> TransformerConfig:
    """Megatron's configuration of the model and its parallel layout; all other fields keep their defaults."""
    model = config.model
    parallel = config.parallel
    bf16 = config.train.precision == "bf16"
    dtype = torch.bfloat16 if bf16 else torch.float32
    kind, latent = (MLATransformerConfig, _latent(model)) if model.latent.enabled else (TransformerConfig, {})
    return kind(
        num_layers=model.layers,
        hidden_size=model.hidden,
        num_attention_heads=model.heads,
        num_query_groups=model.kv_heads,
        kv_channels=model.width_of_head,
        ffn_hidden_size=model.ffn_hidden,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=model.attention_bias is not None,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        num_moe_experts=model.max_experts_per_layer if model.moe_layers else None,
        moe_ffn_hidden_size=model.moe.expert_hidden if model.moe_layers else None,
        moe_layer_freq=[int(model.is_moe_layer(layer)) for layer in range(model.layers)],
        tensor_model_parallel_size=parallel.tensor,
        sequence_parallel=parallel.tensor > 1,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=1,  # the default, the tensor-parallel size, scales gradients incorrectly
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=bf16,
        deallocate_pipeline_outputs=True,
        # With two interleaved stages, each is the other's previous and next stage: batched sends would be mixed up.
        overlap_p2p_comm=parallel.virtual_pipeline > 1,
        batch_p2p_comm=parallel.virtual_pipeline == 1,
        perform_initialization=False,  # see weights.initialize
        use_cpu_initialization=not torch.cuda.is_available(),
        # Fused kernels of Apex and Transformer Engine, which may not be installed.
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        apply_rope_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        **latent,
    )


def _latent(model: ModelConfig) -> dict[str, Any]:
    """Fields of multi-head latent attention; scaled positions are ours (:class:`LatentSelfAttention`)."""
    latent = model.latent
    return {
        "q_lora_rank": latent.q_lora_rank,
        "kv_lora_rank": latent.kv_lora_rank,
        "qk_head_dim": latent.qk_nope_head_dim,
        "qk_pos_emb_head_dim": latent.qk_rope_head_dim,
        "v_head_dim": latent.v_head_dim,
        "rope_type": "rope",
        "rotary_base": model.rope_theta,
        "transformer_impl": "local",
    }


class RepeatableLayer(TransformerLayer):
    """A layer that may be recomputed whole: only its input is kept for the backward pass.

    Megatron's own recomputation does not tell which micro-batch it repeats; counts over micro-batches need that.
    """

    def __init__(self, *args: Any, context: MoEContext, recompute: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.context = context
        self.recompute = recompute

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not (self.recompute and self.training and torch.is_grad_enabled()):
            return self.run(*args, **kwargs)
        return checkpoint(
            self.run, *args, use_reentrant=False, preserve_rng_state=False,
            context_fn=self.context.checkpoint_contexts, **kwargs,
        )  # fmt: skip

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The layer itself, which is repeated."""
        return super().forward(*args, **kwargs)


class ShortcutLayer(RepeatableLayer):
    """A layer of a model in which the output of experts is added behind the next layer.

    Args:
        experts: makes the MoE layer beside the feed-forward; None in a layer without one.
        late: holds the output of the MoE layer before until it is added, for all layers of a stage.
    """

    def __init__(self, *args: Any, experts: ModuleSpec | None, late: list[Tensor], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.late = late
        self.moe: MegatronMoELayer | None = None if experts is None else build_module(experts, config=self.config)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        # A list, because from 0.18 on Megatron hands only one tensor from layer to layer.
        added = list(self.late)
        x, self.late[:] = super().forward(*args, **kwargs)
        return sum(added, x), None

    def run(self, *args: Any, **kwargs: Any) -> tuple[Tensor, list[Tensor]]:
        """The output of the layer without its experts, and theirs."""
        moe = self.moe
        routed: list[Tensor] = []
        if moe is None:
            return super().run(*args, **kwargs)[0], routed
        with self.mlp.register_forward_pre_hook(lambda mlp, inputs: routed.append(moe(inputs[0])[0])):
            return super().run(*args, **kwargs)[0], routed


class MegatronMoELayer(MoELayer):
    """Our MoE layer as the ``mlp`` of a Megatron layer; computes tokens in the order of the plain model.

    With sequence parallelism each rank holds part of every sequence; experts receive tokens from all ranks.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        model: ModelConfig,
        layer: int,
        seed: int,
        context: MoEContext,
        pg_collection: Any = None,
        is_mtp_layer: bool = False,
        name: str | None = None,
    ) -> None:
        # Megatron passes the last three arguments from 0.18 on; the process groups are those of the context.
        super().__init__(model, layer, seed, context)
        self.attention: tuple[CoreAttention] | None = None  # a tuple, as it is not a part of this module
        experts = {id(parameter) for parameter in self.experts.parameters()}
        for parameter in self.parameters():
            if id(parameter) in experts:
                # Gradient norms count experts on every rank: they are not replicated over tensor-parallel ranks.
                tensor_parallel.set_tensor_model_parallel_attributes(parameter, True, 0, 1)
            else:
                parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:  # type: ignore[override]
        """Maps [S, B, D] to [S, B, D], and no bias."""
        y_BSD = super().forward(x.transpose(0, 1), self._importance_BS())
        return y_BSD.transpose(0, 1).contiguous(), None

    def _importance_BS(self) -> Tensor | None:
        """Importance of the positions that this rank holds, if the router needs it."""
        if self.attention is None:
            return None
        whole_BS = self.attention[0].importance_BS
        group = self.context.groups.sequence
        if group is None or whole_BS is None:
            return whole_BS
        return whole_BS.chunk(dist.get_world_size(group), dim=1)[dist.get_rank(group)]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, ShardedTensor]:
        """Shards experts by global index; the router and its state are replicated on all ranks."""
        groups = self.context.groups
        copy = parallel_state.get_expert_data_parallel_rank()
        sharded = {}
        for name, tensor in self.state_dict(keep_vars=True).items():
            key = f"{prefix}{name}"
            if name.startswith("experts."):
                place = (0, groups.expert_rank, groups.expert_parallel)
                sharded[key] = ShardedTensor.from_rank_offsets(key, tensor, place, replica_id=(0, 0, copy))
            else:
                sharded[key] = make_sharded_tensor_for_checkpoint(tensor, key)
        return sharded


def _layer_spec(config: Config, context: MoEContext, late: list[Tensor], layer: int) -> ModuleSpec:
    spec = get_gpt_layer_local_spec(normalization="RMSNorm", multi_latent_attention=config.model.latent.enabled)
    parts = spec.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
    attention = parts.self_attention
    if config.model.latent.enabled:
        attention.module = LatentSelfAttention
        attention.params = attention.params | {"model": config.model}
    elif config.model.qk_norm is not None:
        attention.module = QKNormAttention
        attention.params = attention.params | {"model": config.model}
    if config.model.attention_bias == "all":
        attention.submodules.linear_proj = BiasedOutput
    options = {
        "window": config.model.window_of(layer),
        "measures_importance": config.model.router.NEEDS_ATTENTION,
        "recompute": config.train.recompute == "selective",
        "query_key_scale": config.model.rope_scaling.query_key_scale,
    }
    attention.submodules.core_attention = ModuleSpec(module=CoreAttention, params=options)
    experts = None
    if config.model.is_moe_layer(layer):
        settings = {"model": config.model, "layer": layer, "seed": config.train.seed, "context": context}
        experts = ModuleSpec(module=MegatronMoELayer, params=settings)
    if experts is not None and not config.model.has_feed_forward(layer):
        parts.mlp = experts
    repeats = config.train.recompute == "full"
    if config.model.moe.shortcut:
        spec.module = ShortcutLayer
        spec.params = {"context": context, "recompute": repeats, "experts": experts, "late": late}
    elif repeats:
        spec.module = RepeatableLayer
        spec.params = {"context": context, "recompute": True}
    return spec


def _connect_attention(chunk: nn.Module) -> None:
    """Gives each MoE layer the attention of its decoder layer."""
    for layer in chunk.modules():
        if isinstance(layer, TransformerLayer):
            moe = moe_layer(layer)
            if isinstance(moe, MegatronMoELayer):
                moe.attention = (layer.self_attention.core_attention,)


def build_chunks(config: Config, vocab_size: int, context: MoEContext, device: torch.device) -> list[MegatronModule]:
    """Builds the model chunks of this rank: one, or one per virtual pipeline stage."""
    settings = transformer_config(config)
    parallel = config.parallel
    late: list[Tensor] = []  # the chunks of a rank compute one after the other
    layer_spec = functools.partial(_layer_spec, config, context, late)
    chunks = []
    for number in range(parallel.virtual_pipeline):
        stage = number if parallel.virtual_pipeline > 1 else None
        chunk = build_decoder(
            settings,
            layer_spec,
            RMSNorm,
            stage,
            vocab_size=vocab_size,
            max_sequence_length=config.data.sequence_length,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
            share_embeddings_and_output_weights=config.model.tie_embeddings,
            position_embedding_type="rope",
            rotary_base=config.model.rope_theta,
        )
        predicts = config.model.mtp.layers > 0 and chunk.post_process
        chunk.prediction = (
            MultiTokenPrediction(settings, config, layer_spec, chunk, stage, context) if predicts else None
        )
        chunk.to(device)
        if not config.model.latent.enabled:  # each latent attention has its own
            chunk.rotary_pos_emb.__class__ = DocumentRotaryEmbedding  # both model classes make their own
            chunk.rotary_pos_emb.inv_freq = frequencies(config.model, device)
        if config.model.router.NEEDS_ATTENTION:
            _connect_attention(chunk)
        tensor_rank = parallel_state.get_tensor_model_parallel_rank()
        initialize(chunk, config.model, vocab_size, config.train.seed, tensor_rank, parallel.tensor)
        chunks.append(Float16Module(settings, chunk) if settings.bf16 else chunk)
    return chunks
