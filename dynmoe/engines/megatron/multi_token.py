"""Layers that predict further tokens (:mod:`dynmoe.model.multi_token`), on the last pipeline stage.

Not Megatron's own module: it also runs without labels and in evaluation, keeps no documents apart, averages over each
micro-batch instead of the tokens of a step, and exchanges tokens in another context-parallel order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.distributed import finalize_model_grads
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint
from torch import Tensor, nn

from dynmoe.config import Config
from dynmoe.data.batches import Batch
from dynmoe.engines.loss import counts_BS
from dynmoe.engines.megatron.norms import RMSNorm
from dynmoe.model.multi_token import JoinedInputs
from dynmoe.moe import MoEContext
from dynmoe.ops import attach_loss

_EMBEDDING = "embedding.word_embeddings.weight"


class PredictionLayer(MegatronModule):
    """A layer that predicts a further token; every tensor-parallel rank joins the inputs of its own positions."""

    def __init__(
        self, settings: TransformerConfig, config: Config, spec: ModuleSpec, layer: int, stage: int | None
    ) -> None:
        super().__init__(settings)
        self.join = JoinedInputs(config.model, layer, config.train.seed)
        for parameter in self.join.parameters():
            parameter.sequence_parallel = settings.sequence_parallel  # type: ignore[attr-defined]
        number = layer + 1 - get_transformer_layer_offset(settings, stage)  # Megatron adds the offset
        self.layer = build_module(spec, config=settings, layer_number=number, vp_stage=stage)
        self.norm = RMSNorm(settings, config.model.hidden, config.model.norm_eps)

    def forward(self, hidden_PBD: Tensor, embedded_PBD: Tensor, **places: Any) -> Tensor:
        x_PBD, _ = self.layer(self.join(embedded_PBD, hidden_PBD), **places)
        return self.norm(x_PBD)


class MultiTokenPrediction(MegatronModule):
    """All layers that predict further tokens. Their loss is attached to the output of the decoder's final norm.

    Args:
        settings: Megatron's configuration.
        config: of the run.
        layer_spec: returns the spec of a layer, given its index in the whole decoder.
        chunk: the last model chunk, which has output projection and loss.
        stage: virtual pipeline stage of the chunk; None without an interleaved schedule.
        context: of the MoE layers.

    Attributes:
        batches: those of the next forward pass, one for each layer; empty if it computes no loss of further tokens.
        total_tokens: what their sums of losses are divided by; None: their labels that count.
        loss: mean loss of the latest pass, without gradient.
    """

    def __init__(
        self, settings: TransformerConfig, config: Config, layer_spec: Callable[[int], ModuleSpec], chunk: Any,
        stage: int | None, context: MoEContext,
    ) -> None:  # fmt: skip
        super().__init__(settings)
        model = config.model
        self.layers = nn.ModuleList(
            PredictionLayer(settings, config, layer_spec(layer), layer, stage)
            for layer in range(model.layers, model.trained_layers)
        )
        self.embedding: LanguageModelEmbedding | None = None
        if not chunk.pre_process:  # a copy of the first stage's, or what is tied to it here
            self.embedding = LanguageModelEmbedding(
                settings, chunk.vocab_size, chunk.max_sequence_length, position_embedding_type="rope"
            )
            if model.tie_embeddings:
                self.embedding.word_embeddings.weight = chunk.output_layer.weight
        self.batches: Sequence[Batch] = ()
        self.total_tokens: Tensor | None = None
        self.loss = torch.zeros(())
        self._weight = model.mtp.loss_weight
        self._scale = config.parallel.tensor  # tensor-parallel ranks compute the same loss, unlike those of MoE layers
        self._context = context
        self._chunk = (chunk,)  # a tuple, as it is not a part of this module
        chunk.decoder.register_forward_hook(self._attach, with_kwargs=True)

    def _attach(self, decoder: nn.Module, args: Any, inputs: dict[str, Any], hidden_PBD: Tensor) -> Tensor:
        if not self.batches:
            return hidden_PBD
        embed = self._chunk[0].embedding if self.embedding is None else self.embedding
        places = {name: inputs[name] for name in ("attention_mask", "rotary_pos_emb")}
        x_PBD = hidden_PBD
        losses = []
        for depth, (layer, batch) in enumerate(zip(self.layers, self.batches, strict=True), start=1):
            x_PBD = layer(x_PBD, embed(batch.tokens_BS, None), **places)
            losses.append(self._loss(x_PBD, batch.labels_BS, depth))
        loss = torch.stack(losses).mean()
        self.loss = loss.detach()
        return attach_loss(hidden_PBD, self._weight * loss, self._scale * self._context.step.loss_scale)

    def _loss(self, hidden_PBD: Tensor, labels_BS: Tensor, depth: int) -> Tensor:
        """Cross-entropy of this context-parallel rank's labels."""
        (chunk,) = self._chunk
        shared = chunk.shared_embedding_or_output_weight() if chunk.share_embeddings_and_output_weights else None
        logits, _ = chunk.output_layer(hidden_PBD, weight=shared)
        loss_BS = chunk.compute_language_model_loss(labels_BS, logits)
        counted_BS = counts_BS(labels_BS)
        total = counted_BS.sum().clamp(min=1) if self.total_tokens is None else self.total_tokens[depth]
        return (loss_BS.float() * counted_BS).sum() / total

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, ShardedTensor]:
        """The layers, and the embedding as a copy of the first stage's."""
        state: dict[str, ShardedTensor] = {}
        for number, layer in enumerate(self.layers):
            assert isinstance(layer, PredictionLayer)
            state |= layer.sharded_state_dict(f"{prefix}layers.{number}.", sharded_offsets, metadata)
        if self.embedding is not None:
            copy = (1, 0, parallel_state.get_data_parallel_rank(with_context_parallel=True))
            state[f"{prefix}{_EMBEDDING}"] = make_tp_sharded_tensor_for_checkpoint(
                self.embedding.word_embeddings.weight, _EMBEDDING, replica_id=copy, allow_shape_mismatch=True
            )
        return state


def share_embedding(chunk: Any) -> list[nn.Parameter]:
    """Marks a chunk's embedding if the first stage has one and the last stage a copy; returns it, or [].

    The marks give it a gradient buffer of its own, so that both are sharded alike, and count its norm once. A tied
    embedding needs none, because Megatron itself has a copy of it on the last stage.
    """
    if chunk.share_embeddings_and_output_weights or parallel_state.get_pipeline_model_parallel_world_size() == 1:
        return []
    has_copy = chunk.prediction is not None
    if not (chunk.pre_process or has_copy):
        return []
    weight = (chunk.prediction if has_copy else chunk).embedding.word_embeddings.weight
    weight.shared_embedding = True
    weight.shared = has_copy
    return [weight]


def finalize_gradients(shared: Sequence[Any], *args: Any, **settings: Any) -> None:
    """Megatron's reduction of gradients, and the sum of those of both copies of the embedding."""
    finalize_model_grads(*args, **settings)
    for weight in shared:
        dist.all_reduce(weight.main_grad, group=parallel_state.get_embedding_group())
