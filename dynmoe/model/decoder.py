"""A Llama-style decoder with dynamic mixture-of-experts layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dynmoe.config import ModelConfig
from dynmoe.model.attention import Attention
from dynmoe.model.cache import KeyValueCache, LayerCache
from dynmoe.model.cross_entropy import linear_cross_entropy
from dynmoe.model.documents import Documents
from dynmoe.model.latent_attention import LatentAttention
from dynmoe.model.multi_token import JoinedInputs
from dynmoe.model.rotary import rotary_tables
from dynmoe.moe import MoEContext, MoELayer
from dynmoe.moe.experts import SwiGLU
from dynmoe.moe.initialization import named_normal
from dynmoe.ops import attach_loss


def initial_embedding(model: ModelConfig, vocab_size: int, seed: int, name: str) -> Tensor:
    """Initial weights of the embedding (``w_embed``) or the output projection (``w_out``), [V, D]."""
    return named_normal((vocab_size, model.hidden), model.init_std, seed, name)


def make_attention(model: ModelConfig, layer: int, seed: int, recompute: bool = False) -> Attention | LatentAttention:
    """The attention of a decoder layer; see :class:`Attention` for the arguments."""
    return (LatentAttention if model.latent.enabled else Attention)(model, layer, seed, recompute)


MakeMoE = Callable[[ModelConfig, int, int, MoEContext], MoELayer]


class DecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward with residual connections.

    With ``model.moe.shortcut`` an MoE layer has a dense feed-forward too, and its experts take the same input. Their
    output is added behind the next layer (arXiv 2404.05019).
    """

    def __init__(
        self, model: ModelConfig, layer: int, seed: int, context: MoEContext, make_moe: MakeMoE, recompute: str
    ) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(model.hidden, model.norm_eps)
        self.attention = make_attention(model, layer, seed, recompute == "selective")
        self.ffn_norm = nn.RMSNorm(model.hidden, model.norm_eps)
        self.moe: MoELayer | None = None
        self.ffn: SwiGLU | None = None
        if model.is_moe_layer(layer):
            self.moe = make_moe(model, layer, seed, context)
        if model.has_feed_forward(layer):
            self.ffn = SwiGLU(model, model.ffn_hidden, seed, f"layers.{layer}.ffn")

    def forward(
        self, x_BSD: Tensor, cos_Sd: Tensor, sin_Sd: Tensor, cache: LayerCache | None = None,
        documents: Documents | None = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Output of the layer, and what is to be added behind the next one, both [B, S, D]."""
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), cos_Sd, sin_Sd, cache, documents)
        normed_BSD = self.ffn_norm(x_BSD)
        routed_BSD = None if self.moe is None else self.moe(normed_BSD, self.attention.importance_BS)
        if self.ffn is not None:
            return x_BSD + self.ffn(normed_BSD), routed_BSD
        assert routed_BSD is not None
        return x_BSD + routed_BSD, None


class PredictionLayer(DecoderLayer):
    """A layer that predicts a further token (:mod:`dynmoe.model.multi_token`), for the same arguments."""

    def __init__(
        self, model: ModelConfig, layer: int, seed: int, context: MoEContext, make_moe: MakeMoE, recompute: str
    ) -> None:
        super().__init__(model, layer, seed, context, make_moe, recompute)
        self.join = JoinedInputs(model, layer, seed)
        self.norm = nn.RMSNorm(model.hidden, model.norm_eps)

    def forward(self, hidden_BSD: Tensor, embedded_BSD: Tensor, *places: Any) -> Tensor:  # type: ignore[override]
        x_BSD, _ = super().forward(self.join(embedded_BSD, hidden_BSD), *places)
        return self.norm(x_BSD)


class Decoder(nn.Module):
    """Embedding, decoder layers, final norm and output projection.

    Layers that predict further tokens are behind the others in ``layers``.

    Args:
        model: configuration of the model.
        vocab_size: rows of the embedding.
        seed: seed of the initial weights, which depend on nothing else.
        context: process groups and step state of the MoE layers; default: a new one for a single process.
        recompute: activation recomputation in the backward pass: ``none``, ``selective`` (attention without its
            projections) or ``full`` (each layer).
        make_moe: class of the MoE layers; engines pass their own subclass.

    Attributes:
        loss_ahead: mean loss of the further tokens in the latest pass that predicted any, without gradient.
    """

    def __init__(
        self,
        model: ModelConfig,
        vocab_size: int,
        seed: int,
        context: MoEContext | None = None,
        recompute: str = "none",
        make_moe: MakeMoE = MoELayer,
    ) -> None:
        super().__init__()
        self.settings = model
        self.recompute = recompute
        self.context = MoEContext() if context is None else context
        self.w_embed_VD = nn.Parameter(initial_embedding(model, vocab_size, seed, "w_embed"))
        kinds = [DecoderLayer] * model.layers + [PredictionLayer] * model.mtp.layers
        self.layers = nn.ModuleList(
            kind(model, layer, seed, self.context, make_moe, recompute) for layer, kind in enumerate(kinds)
        )
        self.loss_ahead: Tensor | None = None
        self.norm = nn.RMSNorm(model.hidden, model.norm_eps)
        if not model.tie_embeddings:
            self.w_out_VD = nn.Parameter(initial_embedding(model, vocab_size, seed, "w_out"))

    @property
    def output_weight_VD(self) -> Tensor:
        return self.w_embed_VD if self.settings.tie_embeddings else self.w_out_VD

    @property
    def moe_layers(self) -> list[MoELayer]:
        return [module for module in self.modules() if isinstance(module, MoELayer)]

    def hidden(
        self, tokens_BS: Tensor, cache: KeyValueCache | None = None, prefix_BPD: Tensor | None = None,
        documents: Documents | None = None,
    ) -> Tensor:  # fmt: skip
        """Output of the final norm, [B, S, D].

        Args:
            tokens_BS: the tokens.
            cache: cached positions, which the tokens follow.
            prefix_BPD: embeddings of other inputs, such as patches of an image, which take the P positions before
                the tokens; the output is then [B, P + S, D].
            documents: of the positions, without a cache; None: each sequence is one.
        """
        x_BSD = F.embedding(tokens_BS, self.w_embed_VD)
        if prefix_BPD is not None:
            x_BSD = torch.cat([prefix_BPD, x_BSD], dim=1)
        positions = x_BSD.shape[1]
        layers = list(self.layers)[: self.settings.layers]
        if cache is None:
            places = [self._places(documents or Documents(None, positions, x_BSD.device), positions)] * len(layers)
        else:
            tables = cache.advance(positions, self._tables)
            places = [(*tables, cached) for cached in cache.layers]
        late_BSD = None
        for layer, place in zip(layers, places, strict=True):
            added_BSD = late_BSD
            x_BSD, late_BSD = self._run(layer, x_BSD, *place)
            if added_BSD is not None:
                x_BSD = x_BSD + added_BSD
        self.context.start_counts()  # of all layers; overlaps with the output projection and the loss
        return self.norm(x_BSD)

    def _run(self, layer: nn.Module, *inputs: Any) -> Tensor:
        """The output of a layer, which is computed again in the backward pass if all layers are."""
        if self.recompute != "full" or not torch.is_grad_enabled():
            return layer(*inputs)
        return checkpoint(
            layer, *inputs,
            use_reentrant=False, preserve_rng_state=False, context_fn=self.context.checkpoint_contexts,
        )  # fmt: skip

    def _places(self, documents: Documents, positions: int) -> tuple[Any, ...]:
        """Inputs of a layer besides the activations, for whole sequences."""
        cos_Sd, sin_Sd = self._tables(positions)
        if (place_BS := documents.place_BS) is not None:
            cos_Sd, sin_Sd = (table_Sd[place_BS].unsqueeze(1) for table_Sd in (cos_Sd, sin_Sd))
        return cos_Sd, sin_Sd, None, documents

    def _tables(self, positions: int) -> tuple[Tensor, Tensor]:
        return rotary_tables(positions, self.settings, self.w_embed_VD.device)

    @torch.inference_mode()
    def next_logits(self, tokens_BS: Tensor, cache: KeyValueCache) -> Tensor:
        """Logits [B, V] of the token after ``tokens_BS``, which follow the cached positions."""
        return F.linear(self.hidden(tokens_BS, cache)[:, -1], self.output_weight_VD)

    def forward(
        self, tokens_BS: Tensor, labels_BS: Tensor | None = None, start_BS: Tensor | None = None,
        total_tokens: Tensor | None = None, ahead: Sequence[tuple[Tensor, Tensor]] = (),
    ) -> Tensor:  # fmt: skip
        """Logits [B, S, V], or the cross-entropy in nats if labels (the next tokens) are given.

        Args:
            tokens_BS: the tokens.
            labels_BS: see :func:`linear_cross_entropy`.
            start_BS: place at which each token's document starts, if documents do not see each other.
            total_tokens: see :func:`linear_cross_entropy`; of the labels, then of those of each depth of ``ahead``.
            ahead: tokens and labels of each layer that predicts a further token; its gradients then include those of
                their loss. Without them, these layers are not computed.
        """
        documents = Documents(start_BS, tokens_BS.shape[1], tokens_BS.device)
        hidden_BSD = self.hidden(tokens_BS, documents=documents)
        if labels_BS is None:
            return F.linear(hidden_BSD, self.output_weight_VD)
        totals = [None] * (1 + len(ahead)) if total_tokens is None else total_tokens.unbind()
        if ahead:
            hidden_BSD = self._predict_ahead(hidden_BSD, documents, ahead, totals[1:])
        return self._loss(hidden_BSD, labels_BS, totals[0])

    def _loss(self, hidden_BSD: Tensor, labels_BS: Tensor, total_tokens: Tensor | None) -> Tensor:
        return linear_cross_entropy(hidden_BSD.flatten(0, 1), self.output_weight_VD, labels_BS.flatten(), total_tokens)

    def _predict_ahead(
        self, hidden_BSD: Tensor, documents: Documents, ahead: Sequence[tuple[Tensor, Tensor]],
        totals: Sequence[Tensor | None],
    ) -> Tensor:  # fmt: skip
        """Returns the output of the final norm with the loss of further tokens attached."""
        places = self._places(documents, hidden_BSD.shape[1])
        x_BSD = hidden_BSD
        losses = []
        layers = self.layers[self.settings.layers :]
        for layer, (tokens_BS, labels_BS), total in zip(layers, ahead, totals, strict=True):
            x_BSD = self._run(layer, x_BSD, F.embedding(tokens_BS, self.w_embed_VD), *places)
            losses.append(self._loss(x_BSD, labels_BS, total))
        self.context.start_counts()
        loss = torch.stack(losses).mean()
        self.loss_ahead = loss.detach()
        return attach_loss(hidden_BSD, self.settings.mtp.loss_weight * loss, self.context.step.loss_scale)
