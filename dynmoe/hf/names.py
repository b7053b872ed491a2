"""Names of our decoder's weights in checkpoints of other architectures, and how our tensors are split there.

Each of our tensors is a concatenation of theirs along the rows: queries, keys and values, or gate and up projection.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from dynmoe.config import ModelConfig
from dynmoe.routers.base import without_shape


@dataclass(frozen=True)
class Names:
    """Names within a layer that differ between architectures; all others are as in Llama.

    Attributes:
        halves: how many layers of ours one of theirs is; ``{half}`` in norms, attention and dense counts them.
        norms: the norms before attention and before the feed-forward layer.
        attention: the attention.
        dense: a dense feed-forward layer, with ``{part}``.
        router: the router's weight.
        router_bias: its selection biases, by our name and theirs; None if the architecture has none.
        expert: a single expert, with ``{expert}`` and ``{part}``; None if two tensors hold all experts.
        parts: gate, up and down projection of an expert.
        shared: the shared expert, with ``{part}``.
        shared_gate: its gate.
    """

    halves: int = 1
    norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm")
    attention: str = "self_attn"
    dense: str = "mlp.{part}.weight"
    router: str = "mlp.gate.weight"
    router_bias: tuple[str, str] | None = None
    expert: str | None = "mlp.experts.{expert}.{part}.weight"
    parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    shared: str = "mlp.shared_expert.{part}.weight"
    shared_gate: str = "mlp.shared_expert_gate.weight"

    def of(self, layer: int) -> Names:
        """The names in layer ``layer`` of ours."""
        before, behind, attention, dense = (
            text.replace("{half}", str(layer % self.halves)) for text in (*self.norms, self.attention, self.dense)
        )
        return replace(self, norms=(before, behind), attention=attention, dense=dense)


# Stacked experts, as in a state_dict of transformers 5: of DeepSeek-V3, of LongCat-Flash, and of any other family.
STACKED = "stacked"
STACKED_DEEPSEEK = "stacked deepseek_v3"
STACKED_LONGCAT = "stacked longcat_flash"
_DEEPSEEK = Names(router_bias=("bias_E", "mlp.gate.e_score_correction_bias"), shared="mlp.shared_experts.{part}.weight")
_LONGCAT = Names(
    halves=2,
    norms=("input_layernorm.{half}", "post_attention_layernorm.{half}"),
    attention="self_attn.{half}",
    dense="mlps.{half}.{part}.weight",
    router="mlp.router.classifier.weight",
    router_bias=("bias_X", "mlp.router.e_score_correction_bias"),
)
NAMES = {
    **dict.fromkeys(("llama", "olmoe", "qwen2_moe", "qwen3_moe"), Names()),
    "mixtral": Names(
        router="block_sparse_moe.gate.weight",
        expert="block_sparse_moe.experts.{expert}.{part}.weight",
        parts=("w1", "w3", "w2"),
    ),
    "dynamic_moe": Names(
        norms=("input_norm", "post_attention_norm"), dense="mlp.mlp.{part}.weight", router="mlp.router.weight"
    ),
    STACKED: Names(expert=None),
    "deepseek_v3": _DEEPSEEK,
    STACKED_DEEPSEEK: replace(_DEEPSEEK, expert=None),
    "longcat_flash": _LONGCAT,
    STACKED_LONGCAT: replace(_LONGCAT, expert=None),
    "dynmoe": Names(router="mlp.router.weight", expert=None),
}


@dataclass(frozen=True)
class Part:
    """A tensor of our decoder, or one expert of it, and the checkpoint's tensors that it consists of.

    Attributes:
        ours: name in our decoder.
        theirs: names in the checkpoint, in the order of the rows.
        shape: shape of our tensor.
        rows: number of rows of each of theirs.
        unread: entries that theirs has behind ours, and that nothing reads.
        expert: index of the expert if our tensor is a stack.
        state: whether it is a buffer of a router.
        rotated: latent attention: number of blocks of rows, and of rows of each that are rotated, see ``neighbours``.
        again: whether it is a copy of another part, which a checkpoint may lack.
    """

    ours: str
    theirs: tuple[str, ...]
    shape: tuple[int, ...]
    rows: tuple[int, ...] = ()
    expert: int | None = None
    state: bool = False
    rotated: tuple[int, int] | None = None
    unread: int = 0
    again: bool = False

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each of the checkpoint's tensors."""
        if self.unread:
            return {self.theirs[0]: (self.shape[0] + self.unread, *self.shape[1:])}
        if not self.rows:
            return {self.theirs[0]: self.shape}
        return {name: (rows, *self.shape[1:]) for name, rows in zip(self.theirs, self.rows, strict=True)}


def parts(model: ModelConfig, vocab_size: int, architecture: str) -> Iterator[Part]:
    """All tensors of a model in a checkpoint of ``architecture``, a key of ``NAMES``.

    Only checkpoints of DeepSeek-V3 have layers that predict further tokens.
    """
    hidden = model.hidden
    yield Part("w_embed_VD", ("model.embed_tokens.weight",), (vocab_size, hidden))
    for layer in range(model.trained_layers):
        names = NAMES[architecture].of(layer)
        ours = f"layers.{layer}"
        theirs = f"model.layers.{layer // names.halves}"
        for own, norm in zip(("attention_norm", "ffn_norm"), names.norms, strict=True):
            yield Part(f"{ours}.{own}.weight", (f"{theirs}.{norm}.weight",), (hidden,))
        attention = _latent_attention if model.latent.enabled else _attention
        yield from attention(model, f"{ours}.attention", f"{theirs}.{names.attention}")
        if model.is_moe_layer(layer):
            yield from _moe(model, layer, architecture, f"{ours}.moe", theirs)
        if model.has_feed_forward(layer):
            yield from _swiglu(f"{ours}.ffn", f"{theirs}.{names.dense}", hidden, model.ffn_hidden)
        if layer >= model.layers:
            yield from _prediction(model, vocab_size, ours, theirs)
    yield Part("norm.weight", ("model.norm.weight",), (hidden,))
    if not model.tie_embeddings:
        yield Part("w_out_VD", ("lm_head.weight",), (vocab_size, hidden))


def _prediction(model: ModelConfig, vocab_size: int, ours: str, theirs: str) -> Iterator[Part]:
    """What a layer that predicts a further token has in addition, as published with DeepSeek-V3."""
    hidden = model.hidden
    yield Part(f"{ours}.join.embedding_norm.weight", (f"{theirs}.enorm.weight",), (hidden,))
    yield Part(f"{ours}.join.hidden_norm.weight", (f"{theirs}.hnorm.weight",), (hidden,))
    yield Part(f"{ours}.join.w_join", (f"{theirs}.eh_proj.weight",), (hidden, 2 * hidden))
    yield Part(f"{ours}.norm.weight", (f"{theirs}.shared_head.norm.weight",), (hidden,))
    output = "w_embed_VD" if model.tie_embeddings else "w_out_VD"
    for shared, name in (("w_embed_VD", "embed_tokens"), (output, "shared_head.head")):
        yield Part(shared, (f"{theirs}.{name}.weight",), (vocab_size, hidden), again=True)


def _attention(model: ModelConfig, ours: str, theirs: str) -> Iterator[Part]:
    heads, kv_heads = (count * model.width_of_head for count in (model.heads, model.kv_heads))
    projections = tuple(f"{theirs}.{name}_proj.weight" for name in "qkv")
    rows = (heads, kv_heads, kv_heads)
    yield Part(f"{ours}.w_qkv", projections, (sum(rows), model.hidden), rows)
    yield Part(f"{ours}.w_out", (f"{theirs}.o_proj.weight",), (model.hidden, heads))
    if model.attention_bias is not None:
        biases = tuple(f"{theirs}.{name}_proj.bias" for name in "qkv")
        yield Part(f"{ours}.b_qkv", biases, (sum(rows),), rows)
    if model.attention_bias == "all":
        yield Part(f"{ours}.b_out", (f"{theirs}.o_proj.bias",), (model.hidden,))
    if model.qk_norm is not None:
        whole = model.qk_norm == "projection"
        for name, width in (("q_norm", heads), ("k_norm", kv_heads)):
            shape = (width if whole else model.width_of_head,)
            yield Part(f"{ours}.{name}.weight", (f"{theirs}.{name}.weight",), shape)


def _latent_attention(model: ModelConfig, ours: str, theirs: str) -> Iterator[Part]:
    latent = model.latent
    hidden = model.hidden
    rotated = latent.qk_rope_head_dim
    rank = latent.kv_lora_rank
    assert rank is not None
    queries = model.heads * model.width_of_head

    def part(own: str, name: str, shape: tuple[int, ...], blocks: int = 0) -> Part:
        places = (blocks, rotated) if blocks else None
        return Part(f"{ours}.{own}", (f"{theirs}.{name}.weight",), shape, rotated=places)

    if latent.q_lora_rank is None:
        yield part("w_q", "q_proj", (queries, hidden), model.heads)
    else:
        yield part("w_q_down", "q_a_proj", (latent.q_lora_rank, hidden))
        yield part("q_norm.weight", "q_a_layernorm", (latent.q_lora_rank,))
        yield part("w_q_up", "q_b_proj", (queries, latent.q_lora_rank), model.heads)
    yield part("w_kv_down", "kv_a_proj_with_mqa", (rank + rotated, hidden), 1)
    yield part("kv_norm.weight", "kv_a_layernorm", (rank,))
    yield part("w_kv_up", "kv_b_proj", (model.heads * (latent.qk_nope_head_dim + latent.v_head_dim), rank))
    yield part("w_out", "o_proj", (hidden, model.heads * latent.v_head_dim))


def _swiglu(ours: str, theirs: str, hidden: int, width: int) -> Iterator[Part]:
    gate, up, down = (theirs.format(part=part) for part in Names.parts)
    yield Part(f"{ours}.w_up_HD", (gate, up), (2 * width, hidden), (width, width))
    yield Part(f"{ours}.w_down_DF", (down,), (hidden, width))


def _moe(model: ModelConfig, layer: int, architecture: str, ours: str, theirs: str) -> Iterator[Part]:
    names = NAMES[architecture]
    hidden = model.hidden
    experts = model.experts_of(layer)
    width = model.moe.expert_hidden
    identity = model.router.num_zero_computation
    if architecture == "dynmoe":
        yield from _router(model, experts, f"{ours}.router", f"{theirs}.mlp.router")
    else:
        yield Part(f"{ours}.router.weight_ED", (f"{theirs}.{names.router}",), (experts + identity, hidden))
    if names.router_bias is not None:
        own, bias = names.router_bias
        yield Part(f"{ours}.router.{own}", (f"{theirs}.{bias}",), (experts + identity,), state=True)
    if names.expert is None:
        stacks = f"{theirs}.mlp.experts"
        shape = (experts, 2 * width, hidden)
        unread = identity if architecture == STACKED_LONGCAT else 0
        yield Part(f"{ours}.experts.w_up_EHD", (f"{stacks}.gate_up_proj",), shape, unread=unread)
        yield Part(f"{ours}.experts.w_down_EDF", (f"{stacks}.down_proj",), (experts, hidden, width))
    else:
        for expert in range(experts):
            gate, up, down = (f"{theirs}.{names.expert.format(expert=expert, part=part)}" for part in names.parts)
            yield Part(f"{ours}.experts.w_up_EHD", (gate, up), (2 * width, hidden), (width, width), expert)
            yield Part(f"{ours}.experts.w_down_EDF", (down,), (hidden, width), expert=expert)
    if model.moe.shared_hidden:
        yield from _swiglu(f"{ours}.shared", f"{theirs}.{names.shared}", hidden, model.moe.shared_hidden)
    if model.moe.shared_gate:
        yield Part(f"{ours}.shared.w_gate_1D", (f"{theirs}.{names.shared_gate}",), (1, hidden))


def _router(model: ModelConfig, experts: int, ours: str, theirs: str) -> Iterator[Part]:
    """Parameters and exported state of a router, as named in ``modeling_dynmoe.py``."""
    hidden = model.hidden
    for name, tensor in model.router.parameters(hidden, experts).items():
        yield Part(f"{ours}.{name}", (f"{theirs}.{without_shape(name)}",), tensor.shape)
    yield Part(f"{ours}.active_E", (f"{theirs}.active",), (experts,), state=True)
    for name, tensor in model.router.stored_buffers(hidden, experts).items():
        if tensor.export == "tensor":
            yield Part(f"{ours}.{name}", (f"{theirs}.{without_shape(name)}",), tensor.shape, state=True)
