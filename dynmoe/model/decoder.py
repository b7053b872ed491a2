"""A Llama-style decoder with dynamic mixture-of-experts layers."""

from __future__ import annotations

from collections.abc import Callable

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
from dynmoe.model.rotary import rotary_tables
from dynmoe.moe import MoEContext, MoELayer
from dynmoe.moe.experts import SwiGLU
from dynmoe.moe.initialization import named_normal


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


class Decoder(nn.Module):
    """Embedding, decoder layers, final norm and output projection.

    Args:
        model: configuration of the model.
        vocab_size: rows of the embedding.
        seed: seed of the initial weights, which depend on nothing else.
        context: process groups and step state of the MoE layers; default: a new one for a single process.
        recompute: activation recomputation in the backward pass: ``none``, ``selective`` (attention without its
            projections) or ``full`` (each layer).
        make_moe: class of the MoE layers; engines pass their own subclass.
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
        layers = [DecoderLayer(model, layer, seed, self.context, make_moe, recompute) for layer in range(model.layers)]
        self.layers = nn.ModuleList(layers)
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
        start_BS: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Output of the final norm, [B, S, D].

        Args:
            tokens_BS: the tokens.
            cache: cached positions, which the tokens follow.
            prefix_BPD: embeddings of other inputs, such as patches of an image, which take the P positions before
                the tokens; the output is then [B, P + S, D].
            start_BS: place at which each token's document starts, if documents do not see each other; without cache
                and prefix.
        """
        x_BSD = F.embedding(tokens_BS, self.w_embed_VD)
        if prefix_BPD is not None:
            x_BSD = torch.cat([prefix_BPD, x_BSD], dim=1)
        positions = x_BSD.shape[1]
        cos_Sd, sin_Sd = self._tables(positions) if cache is None else cache.advance(positions, self._tables)
        documents = Documents(start_BS, positions, x_BSD.device) if cache is None else None
        if documents is not None and (place_BS := documents.place_BS) is not None:
            cos_Sd, sin_Sd = (table_Sd[place_BS].unsqueeze(1) for table_Sd in (cos_Sd, sin_Sd))
        late_BSD = None
        for number, layer in enumerate(self.layers):
            added_BSD = late_BSD
            if cache is not None:
                x_BSD, late_BSD = layer(x_BSD, cos_Sd, sin_Sd, cache.layers[number])
            elif self.recompute == "full" and torch.is_grad_enabled():
                x_BSD, late_BSD = checkpoint(
                    layer, x_BSD, cos_Sd, sin_Sd, None, documents,
                    use_reentrant=False, preserve_rng_state=False, context_fn=self.context.checkpoint_contexts,
                )  # fmt: skip
            else:
                x_BSD, late_BSD = layer(x_BSD, cos_Sd, sin_Sd, None, documents)
            if added_BSD is not None:
                x_BSD = x_BSD + added_BSD
        self.context.start_counts()  # of all layers; overlaps with the output projection and the loss
        return self.norm(x_BSD)

    def _tables(self, positions: int) -> tuple[Tensor, Tensor]:
        return rotary_tables(positions, self.settings, self.w_embed_VD.device)

    @torch.inference_mode()
    def next_logits(self, tokens_BS: Tensor, cache: KeyValueCache) -> Tensor:
        """Logits [B, V] of the token after ``tokens_BS``, which follow the cached positions."""
        return F.linear(self.hidden(tokens_BS, cache)[:, -1], self.output_weight_VD)

    def forward(
        self, tokens_BS: Tensor, labels_BS: Tensor | None = None, start_BS: Tensor | None = None,
        total_tokens: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Logits [B, S, V], or the cross-entropy in nats if labels (the next tokens) are given.

        Args:
            tokens_BS, start_BS: see :meth:`hidden`.
            labels_BS, total_tokens: see :func:`linear_cross_entropy`.
        """
        hidden_BSD = self.hidden(tokens_BS, start_BS=start_BS)
        if labels_BS is None:
            return F.linear(hidden_BSD, self.output_weight_VD)
        return linear_cross_entropy(hidden_BSD.flatten(0, 1), self.output_weight_VD, labels_BS.flatten(), total_tokens)
