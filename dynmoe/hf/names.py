"""How the weights of the plain model are called, and cut, in checkpoints of other makers.

Every tensor of ours is theirs, one below the other: queries, keys and values, or gate and up projection.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dynmoe.config import ModelConfig
from dynmoe.routers.base import without_shape


@dataclass(frozen=True)
class Names:
    """Names within a layer of a checkpoint, where makers differ; the rest is as in Llama.

    Attributes:
        norms: before attention and before the feed-forward.
        dense: of a feed-forward without experts, with ``{part}``.
        router: weight of a router of logits.
        expert: of one expert, with ``{expert}`` and ``{part}``; None where all lie in two stacked tensors.
        parts: gate, up and down projection of an expert.
        shared: of the shared expert, with ``{part}``.
    """

    norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm")
    dense: str = "mlp.{part}.weight"
    router: str = "mlp.gate.weight"
    expert: str | None = "mlp.experts.{expert}.{part}.weight"
    parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    shared: str = "mlp.shared_expert.{part}.weight"


# Any family with experts as transformers 5 keeps it in memory, which a state_dict shows.
STACKED = "stacked"
NAMES = {
    "llama": Names(),
    "olmoe": Names(),
    "qwen2_moe": Names(),
    "qwen3_moe": Names(),
    "mixtral": Names(
        router="block_sparse_moe.gate.weight",
        expert="block_sparse_moe.experts.{expert}.{part}.weight",
        parts=("w1", "w3", "w2"),
    ),
    "dynamic_moe": Names(
        norms=("input_norm", "post_attention_norm"), dense="mlp.mlp.{part}.weight", router="mlp.router.weight"
    ),
    STACKED: Names(expert=None),
    "dynmoe": Names(router="mlp.router.weight", expert=None),
}


@dataclass(frozen=True)
class Part:
    """A tensor of the plain model, or one expert of it, and the tensors of a checkpoint that lie in it.

    Attributes:
        ours: name in the plain model.
        theirs: names in the checkpoint, from the first row to the last.
        shape: of ours.
        rows: of each of theirs.
        expert: index of the expert where ours is a stack of them.
        state: a buffer of a router.
    """

    ours: str
    theirs: tuple[str, ...]
    shape: tuple[int, ...]
    rows: tuple[int, ...] = ()
    expert: int | None = None
    state: bool = False

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of each of theirs."""
        if not self.rows:
            return {self.theirs[0]: self.shape}
        return {name: (rows, *self.shape[1:]) for name, rows in zip(self.theirs, self.rows, strict=True)}


def parts(model: ModelConfig, vocab_size: int, maker: str) -> Iterator[Part]:
    """All tensors of a model in a checkpoint of ``maker`` (a key of ``NAMES``)."""
    hidden = model.hidden
    yield Part("w_embed_VD", ("model.embed_tokens.weight",), (vocab_size, hidden))
    for layer in range(model.layers):
        ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
        yield from _attention(model, NAMES[maker], ours, theirs)
        if model.is_moe_layer(layer):
            yield from _moe(model, layer, maker, f"{ours}.moe", theirs)
        else:
            yield from _swiglu(f"{ours}.ffn", f"{theirs}.{NAMES[maker].dense}", hidden, model.ffn_hidden)
    yield Part("norm.weight", ("model.norm.weight",), (hidden,))
    if not model.tie_embeddings:
        yield Part("w_out_VD", ("lm_head.weight",), (vocab_size, hidden))


def _attention(model: ModelConfig, names: Names, ours: str, theirs: str) -> Iterator[Part]:
    heads, kv_heads = (count * model.width_of_head for count in (model.heads, model.kv_heads))
    for own, norm in zip(("attention_norm", "ffn_norm"), names.norms, strict=True):
        yield Part(f"{ours}.{own}.weight", (f"{theirs}.{norm}.weight",), (model.hidden,))
    projections = tuple(f"{theirs}.self_attn.{name}_proj.weight" for name in "qkv")
    rows = (heads, kv_heads, kv_heads)
    yield Part(f"{ours}.attention.w_qkv", projections, (sum(rows), model.hidden), rows)
    yield Part(f"{ours}.attention.w_out", (f"{theirs}.self_attn.o_proj.weight",), (model.hidden, heads))
    if model.qk_norm is not None:
        whole = model.qk_norm == "projection"
        for name, width in (("q_norm", heads), ("k_norm", kv_heads)):
            shape = (width if whole else model.width_of_head,)
            yield Part(f"{ours}.attention.{name}.weight", (f"{theirs}.self_attn.{name}.weight",), shape)


def _swiglu(
    ours: str, theirs: str, hidden: int, width: int, names: tuple[str, str, str] = Names.parts
) -> Iterator[Part]:
    gate, up, down = (theirs.format(part=part) for part in names)
    yield Part(f"{ours}.w_up_HD", (gate, up), (2 * width, hidden), (width, width))
    yield Part(f"{ours}.w_down_DF", (down,), (hidden, width))


def _moe(model: ModelConfig, layer: int, maker: str, ours: str, theirs: str) -> Iterator[Part]:
    names, hidden, experts, width = NAMES[maker], model.hidden, model.experts_of(layer), model.moe.expert_hidden
    if maker == "dynmoe":
        yield from _router(model, experts, f"{ours}.router", f"{theirs}.mlp.router")
    else:
        yield Part(f"{ours}.router.weight_ED", (f"{theirs}.{names.router}",), (experts, hidden))
    if names.expert is None:
        stacks = {"w_up_EHD": ("gate_up_proj", 2 * width, hidden), "w_down_EDF": ("down_proj", hidden, width)}
        for own, (name, rows, columns) in stacks.items():
            yield Part(f"{ours}.experts.{own}", (f"{theirs}.mlp.experts.{name}",), (experts, rows, columns))
    else:
        for expert in range(experts):
            gate, up, down = (f"{theirs}.{names.expert.format(expert=expert, part=part)}" for part in names.parts)
            yield Part(f"{ours}.experts.w_up_EHD", (gate, up), (2 * width, hidden), (width, width), expert)
            yield Part(f"{ours}.experts.w_down_EDF", (down,), (hidden, width), expert=expert)
    if model.moe.shared_hidden:
        yield from _swiglu(f"{ours}.shared", f"{theirs}.{names.shared}", hidden, model.moe.shared_hidden)


def _router(model: ModelConfig, experts: int, ours: str, theirs: str) -> Iterator[Part]:
    """Parameters and exported state of a router, in modeling_dynmoe.py."""
    hidden = model.hidden
    for name, tensor in model.router.parameters(hidden, experts).items():
        yield Part(f"{ours}.{name}", (f"{theirs}.{without_shape(name)}",), tensor.shape)
    yield Part(f"{ours}.active_E", (f"{theirs}.active",), (experts,), state=True)
    for name, tensor in model.router.buffers(hidden, experts).items():
        if tensor.export == "tensor":
            yield Part(f"{ours}.{name}", (f"{theirs}.{without_shape(name)}",), tensor.shape, state=True)
