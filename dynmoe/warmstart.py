"""Begins a run from a trained one of another kind: dense to experts, top-k to top-p.

python -m dynmoe.warmstart RUN OUT --experts 8 model.router.kind=top_any
python -m dynmoe.warmstart RUN OUT model.router.kind=top_p
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

from dynmoe.cli import run_tool
from dynmoe.config import Config, ModelConfig, load_config
from dynmoe.errors import UserError
from dynmoe.routers import ROUTERS, TopP

if TYPE_CHECKING:
    from torch import Tensor

    from dynmoe.model import Decoder
    from dynmoe.moe.experts import SwiGLU

_BREAK = 0.1
_SEQUENCES = 8


@dataclass(frozen=True)
class WarmStart:
    """What became of a model, on the same validation text.

    Attributes:
        config: of the new run.
        loss_before, loss: in nats per token.
        difference: the largest of any logit.
        experts_per_token: of each MoE layer.
    """

    config: Config
    loss_before: float
    loss: float
    difference: float
    experts_per_token: list[float]


def warm_start(
    run: Path,
    output: Path,
    experts: int | None = None,
    granularity: int = 1,
    experts_per_token: float | None = None,
    overrides: Sequence[str] = (),
    symmetry_break: float = _BREAK,
) -> WarmStart:
    """Makes the run directory ``output``, whose training starts from what the model of ``run`` knows.

    A dense model becomes one of experts: copies of its feed-forward layers (arXiv 2212.05055), or with a granularity g
    slices of them, of which g experts in a row make one copy and share their row of the router (arXiv 2410.07524). A
    top-k model becomes a top-p model with p fitted, layer by layer, to as many experts per token.

    Args:
        run: directory of the run, of either engine.
        output: directory of the new run; must not exist.
        experts: of each MoE layer, for a dense model: a multiple of ``granularity``.
        granularity: slices of one feed-forward layer.
        experts_per_token: that p is fitted to; None: as many as top-k has, and p as configured after a dense model.
        overrides: of the run's configuration.
        symmetry_break: see :func:`dynmoe.moe.upcycling.copy_experts`.

    Raises:
        UserError: a model that cannot become the other, no text to measure on, or an output that exists.
    """
    import torch

    from dynmoe.model import Decoder
    from dynmoe.moe.layer import keeping_plans
    from dynmoe.moe.upcycling import copy_experts, share_rows
    from dynmoe.train.checkpoint import model_files
    from dynmoe.trained import begin_run, open_trained

    if output.exists():
        raise UserError(f"OUT: {output} exists; name a new directory")
    old = load_config(run / "config.yaml")
    config = _configuration(old, run, output, experts, granularity, overrides)
    fitted = isinstance(config.model.router, TopP)
    if fitted and old.model.moe_layers and experts_per_token is None:
        experts_per_token = old.model.router.expected_experts
    if experts_per_token is not None and not fitted:
        raise UserError(f"--experts-per-token={experts_per_token}: fits p of a top_p router; set it there")
    model = open_trained(run, torch.device("cpu"))
    tokens_BS = _some_text(config, model.tokenizer.sha256)
    decoder = Decoder(config.model, model.decoder.w_embed_VD.shape[0], config.train.seed).eval()
    _copy(model.decoder, decoder)
    if not old.model.moe_layers:
        for layer in decoder.moe_layers:
            dense: SwiGLU = model.decoder.layers[layer.layer].ffn  # type: ignore[assignment]
            copy_experts(dense, layer.experts, granularity, config.train.seed + layer.layer, symmetry_break)
            share_rows(layer, granularity)
    if experts_per_token is not None:
        fit_p(decoder, tokens_BS, experts_per_token)
    with keeping_plans(decoder.moe_layers) as plans:
        loss_before, loss, difference = _compare(model.decoder, decoder, tokens_BS)
    begin_run(config, decoder, model_files(run), output)
    layers, tokens = len(decoder.moe_layers), tokens_BS.numel()
    means = [sum(float(p.routing_map_TE.sum()) for p in plans[layer::layers]) / tokens for layer in range(layers)]
    return WarmStart(config, loss_before, loss, difference, means)


def _configuration(
    old: Config, run: Path, output: Path, experts: int | None, granularity: int, overrides: Sequence[str]
) -> Config:
    """That of the new run; what is overridden is not what the source dictates."""
    place = [f"run.dir={output.parent}", f"run.name={output.name}"]
    kinds = [field for field in overrides if field.startswith("model.router.kind=")]
    kind = load_config(None, kinds).model.router.kind if kinds else old.model.router.kind
    if old.model.moe_layers:
        if experts is not None:
            raise UserError(f"--experts={experts}: {run} has experts already; leave it out")
        if (old.model.router.kind, kind) != ("top_k", "top_p"):
            raise UserError(f"model.router.kind={kind}: {old.model.router.kind} becomes no {kind}; top_k becomes top_p")
        own = [f"model.router.renormalize={str(old.model.router.resolved.renormalize).lower()}"]  # type: ignore[attr-defined]
    else:
        own = _of_dense(old.model, run, kind, experts, granularity)
    config = load_config(run / "config.yaml", [*own, *overrides, *place])
    _check_same(old.model, config.model)
    return config


def _of_dense(old: ModelConfig, run: Path, kind: str, experts: int | None, granularity: int) -> list[str]:
    """What makes experts of a dense model, and leaves its output as it is where the router of this kind can."""
    if experts is None:
        raise UserError(f"--experts: {run} is dense; say how many experts each layer is to have")
    if granularity < 1 or experts % granularity or old.ffn_hidden % (8 * granularity):
        cure = f"use a divisor of both, and let the slices of {old.ffn_hidden} be multiples of 8 wide"
        raise UserError(f"--granularity={granularity}: cannot slice {experts} experts evenly; {cure}")
    fields = [f"model.moe.experts={experts}", f"model.moe.expert_hidden={old.ffn_hidden // granularity}"]
    wanted = ROUTERS[kind]().upcycling_fields(granularity)
    return fields + [f"model.router.{name}={json.dumps(value)}" for name, value in wanted.items()]


def _check_same(old: ModelConfig, new: ModelConfig) -> None:
    """Refuses a change of what is copied."""
    names = (
        "layers",
        "hidden",
        "heads",
        "kv_heads",
        "head_dim",
        "qk_norm",
        "vocab_size",
        "tie_embeddings",
        "ffn_hidden",
    )
    for name in names:
        if getattr(old, name) != getattr(new, name):
            raise UserError(f"model.{name}={getattr(new, name)}: the weights are of {getattr(old, name)}; leave it out")


def _some_text(config: Config, tokenizer: str) -> Tensor:
    """Sequences [B, S] of the validation text, of each corpus as many as training's share of it asks for."""
    import torch

    from dynmoe.data.corpus import by_domain, open_corpora
    from dynmoe.data.validation import apportion, training_shares

    length = config.data.sequence_length
    corpora = open_corpora(config.data.dirs, length)
    if corpora[0].tokenizer.sha256 != tokenizer:
        raise UserError(f"data.dirs: {corpora[0].path} was encoded by another tokenizer than the run's; name another")
    domains = by_domain(corpora)
    limits = {name: corpus.sequences("validation", length) for name, corpus in domains.items()}
    total = min(max(_SEQUENCES, len(domains)), sum(limits.values()))
    tokens: list[int] = []
    for name, rows in apportion(total, training_shares(corpora, config.data.weights), limits).items():
        documents = domains[name].splits["validation"].documents()
        tokens += islice(chain.from_iterable(documents), rows * length)
    return torch.tensor(tokens).view(total, length)


def _copy(old: Decoder, new: Decoder) -> None:
    """Parameters and state that both have under one name."""
    import torch

    known = {**dict(old.named_parameters()), **dict(old.named_buffers())}
    with torch.no_grad():
        for name, place in [*new.named_parameters(), *new.named_buffers()]:
            if name in known:
                place.copy_(known[name])


def fit_p(decoder: Decoder, tokens_BS: Tensor, experts_per_token: float) -> None:
    """Sets p of each top-p layer, from the first to the last, to ``experts_per_token`` in the mean over the tokens."""
    import torch

    from dynmoe.moe.layer import keeping_plans

    for layer in decoder.moe_layers:
        router = layer.router
        assert isinstance(router.spec, TopP)
        with keeping_plans([layer]) as plans, torch.no_grad():
            decoder.hidden(tokens_BS)
        logits_TE = plans[0].logits_TE
        assert logits_TE is not None
        with torch.no_grad():
            router.spec.fit(router, logits_TE, experts_per_token)


def _compare(old: Decoder, new: Decoder, tokens_BS: Tensor) -> tuple[float, float, float]:
    """Cross-entropy of both in nats, over all tokens but the first of a sequence; the largest difference of logits."""
    import torch
    import torch.nn.functional as F

    losses, differences = [], []
    with torch.no_grad():
        for tokens_S in tokens_BS:  # one after the other: logits are large
            both = [decoder(tokens_S[None])[0] for decoder in (old, new)]
            losses.append([float(F.cross_entropy(logits_SV[:-1], tokens_S[1:])) for logits_SV in both])
            differences.append(float((both[0] - both[1]).abs().max()))
    before, after = (sum(column) / len(losses) for column in zip(*losses, strict=True))
    return before, after, max(differences)


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m dynmoe.warmstart", description="Begins a run from a dense or a top-k one, with what that has learnt."
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="directory of the trained run, of either engine")
    parser.add_argument("output", type=Path, metavar="OUT", help="directory of the new run")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="model.router.kind=top_any and the like")
    parser.add_argument("--experts", type=int, help="of each MoE layer, for a dense model")
    parser.add_argument(
        "--granularity", type=int, default=1, help="cut each feed-forward layer into so many experts; 1: whole copies"
    )
    parser.add_argument("--experts-per-token", type=float, help="that p is fitted to; after top-k: its k")
    parser.add_argument(
        "--symmetry-break",
        type=float,
        default=_BREAK,
        help="how differently the copies learn; leaves the output as it is",
    )
    given = parser.parse_intermixed_args()
    done = warm_start(
        given.run, given.output, given.experts, given.granularity, given.experts_per_token, given.overrides,
        given.symmetry_break,
    )  # fmt: skip
    mean = sum(done.experts_per_token) / len(done.experts_per_token)
    print(f"{given.output}: a run of {done.config.engine} that begins with what {given.run} has learnt.")
    print(
        f"On the same text: loss {done.loss:.4f} after {done.loss_before:.4f}, logits differ by {done.difference:.1e} "
        f"at most, {mean:.2f} experts per token (by layer: {', '.join(f'{k:.2f}' for k in done.experts_per_token)})."
    )
    print(f"Train it with: torchrun train.py {given.output / 'config.yaml'}")


if __name__ == "__main__":
    run_tool(main)
