"""Start a run from a trained run of another kind: dense to experts, top-k to top-p.

python -m dynmoe.warmstart RUN OUT --experts 8 model.router.kind=top_any
python -m dynmoe.warmstart RUN OUT model.router.kind=top_p
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING

from dynmoe.cli import run_tool
from dynmoe.config import Config, ModelConfig, load_config
from dynmoe.config.load import read_override
from dynmoe.config.router_fields import chosen_router
from dynmoe.errors import UserError
from dynmoe.routers import ROUTERS, TopP

if TYPE_CHECKING:
    from torch import Tensor

    from dynmoe.data.tokenizer import Tokenizer
    from dynmoe.model import Decoder
    from dynmoe.moe.experts import SwiGLU

_BREAK = 0.1
_SEQUENCES = 8


@dataclass(frozen=True)
class WarmStart:
    """The result of a warm start, measured on validation text.

    Attributes:
        config: configuration of the new run.
        loss_before, loss: loss of the old and of the new model, in nats per token.
        difference: largest absolute difference of the logits.
        experts_per_token: mean number of experts per token in each MoE layer.
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
    """Creates the run directory ``output``, whose training starts from the model of ``run``.

    A dense model becomes an MoE model. Its experts are copies of the feed-forward layers (arXiv 2212.05055) or, with
    granularity g, slices of them: g consecutive experts form a copy and share a router row (arXiv 2410.07524). A top-k
    model becomes a top-p model, with p fitted layer by layer to the same number of experts per token.

    Args:
        run: directory of the run, of either engine.
        output: directory of the new run; must not exist.
        experts: number of experts per MoE layer, for a dense model; a multiple of ``granularity``.
        granularity: number of slices of one feed-forward layer.
        experts_per_token: target for fitting p; None: the k of top-k, and no fit after a dense model.
        overrides: overrides of the run's configuration.
        symmetry_break: see :func:`dynmoe.moe.upcycling.copy_experts`.

    Raises:
        UserError: the model cannot be converted, there is no validation text, or the output exists.
    """
    import torch

    from dynmoe.model import Decoder
    from dynmoe.moe.layer import capture_plans
    from dynmoe.train.checkpoint import model_files
    from dynmoe.trained import begin_run, open_trained

    if output.exists():
        raise UserError(f"OUT: {output} exists; name a new directory")
    old = load_config(run / "config.yaml")
    config = _configuration(old, run, output, experts, granularity, overrides)
    wanted = _experts_of_fit(old, config, experts_per_token)
    model = open_trained(run, torch.device("cpu"), mtp=True)
    tokens_BS = _validation_text(config, model.tokenizer)
    decoder = Decoder(config.model, model.decoder.w_embed_VD.shape[0], config.train.seed).eval()
    decoder.context.aim(config.budget.experts_per_token)
    _copy(model.decoder, decoder)
    if not old.model.moe_layers:
        _upcycle(model.decoder, decoder, granularity, config.train.seed, symmetry_break)
    if wanted is not None:
        fit_p(decoder, tokens_BS, wanted)
    measured = [layer for layer in decoder.moe_layers if layer.layer < config.model.layers]
    with capture_plans(measured) as plans:
        loss_before, loss, difference = _compare(model.decoder, decoder, tokens_BS)
    begin_run(config, decoder, model_files(run), output)
    layers = len(measured)
    routes = [sum(float(plan.routing_map_TE.sum()) for plan in plans[layer::layers]) for layer in range(layers)]
    return WarmStart(config, loss_before, loss, difference, [count / tokens_BS.numel() for count in routes])


def _experts_of_fit(old: Config, config: Config, given: float | None) -> float | None:
    """Experts per token to which p of the new model is fitted; None: it is not fitted."""
    if config.model.router.kind != TopP.kind:
        if given is not None:
            raise UserError(f"--experts-per-token={given}: only top_p fits p; use model.router.kind=top_p")
        return None
    if config.model.router.budgets:
        return config.budget.experts_per_token  # p is fitted to each budget
    if given is None and old.model.moe_layers:
        return old.budget.experts_per_token or old.model.router.expected_experts
    return given


def _upcycle(dense: Decoder, decoder: Decoder, granularity: int, seed: int, symmetry_break: float) -> None:
    """Fills the experts of ``decoder`` with copies or slices of the feed-forward layers of ``dense``.

    Layers that predict further tokens and that ``dense`` does not have keep their new weights.
    """
    from dynmoe.moe.upcycling import copy_experts, share_rows

    for layer in (own for own in decoder.moe_layers if own.layer < len(dense.layers)):
        source: SwiGLU = dense.layers[layer.layer].ffn  # type: ignore[assignment]
        copy_experts(source, layer.experts, granularity, seed + layer.layer, symmetry_break)
        share_rows(layer, granularity)


def _configuration(
    old: Config, run: Path, output: Path, experts: int | None, granularity: int, overrides: Sequence[str]
) -> Config:
    """Configuration of the new run; overrides must not contradict the source."""
    place = [f"run.dir={output.parent}", f"run.name={output.name}"]
    kinds = [read_override(field) for field in overrides if field.startswith("model.router.kind=")]
    kind = chosen_router(kinds).kind if kinds else old.model.router.kind
    if old.model.moe_layers:
        if experts is not None:
            raise UserError(f"--experts={experts}: {run} already has experts; remove the option")
        if (old.model.router.kind, kind) != ("top_k", "top_p"):
            problem = f"a {old.model.router.kind} run cannot become {kind}; only top_k can become top_p"
            raise UserError(f"model.router.kind={kind}: {problem}")
        own = [f"model.router.renormalize={str(old.model.router.resolved.renormalize).lower()}"]  # type: ignore[attr-defined]
    else:
        own = _of_dense(old.model, run, kind, experts, granularity)
    config = load_config(run / "config.yaml", [*own, *overrides, *place])
    _check_same(old.model, config.model)
    active = config.model.moe.active_at_start
    if granularity > 1 and active is not None and active < config.model.moe.experts:
        problem = f"with --granularity={granularity}, it may select some slices of the dense layer and not the others"
        raise UserError(f"model.moe.active_at_start={active}: {problem}; remove it")
    return config


def _of_dense(old: ModelConfig, run: Path, kind: str, experts: int | None, granularity: int) -> list[str]:
    """Fields that turn a dense model into experts, without a change of the output if the router allows it."""
    if experts is None:
        raise UserError(f"--experts: required, because {run} is dense; set the number of experts per layer")
    if granularity < 1 or experts % granularity or old.ffn_hidden % (8 * granularity):
        problem = f"must divide {experts} experts, and model.ffn_hidden={old.ffn_hidden} into multiples of 8"
        raise UserError(f"--granularity={granularity}: {problem}; use another value or number of experts")
    fields = [f"model.moe.experts={experts}", f"model.moe.expert_hidden={old.ffn_hidden // granularity}"]
    wanted = ROUTERS[kind]().upcycling_fields(granularity)
    return fields + [f"model.router.{name}={json.dumps(value)}" for name, value in wanted.items()]


# Fields of the model that say which weights it has, without those that turn a dense layer into experts.
_WEIGHTS = (
    "layers", "hidden", "heads", "kv_heads", "head_dim", "vocab_size", "ffn_hidden", "qk_norm", "attention_bias",
    "tie_embeddings", "moe.shortcut",
)  # fmt: skip
_WEIGHTS_OF_EXPERTS = (
    "moe.experts", "moe.experts_by_layer", "moe.expert_hidden", "moe.shared_hidden", "moe.shared_gate",
    "moe.moe_layer_freq", "moe.first_k_dense_replace",
)  # fmt: skip


def _check_same(old: ModelConfig, new: ModelConfig) -> None:
    """Checks that no override changes which weights are copied, or their shapes."""
    latent = (f"latent.{spec.name}" for spec in dataclasses.fields(old.latent))
    for name in (*_WEIGHTS, *latent, *(_WEIGHTS_OF_EXPERTS if old.moe_layers else ())):
        before, after = (attrgetter(name)(model) for model in (old, new))
        if before != after:
            raise UserError(f"model.{name}={after}: the weights have {before}; remove the override")
    if new.mtp.layers < old.mtp.layers:  # more may be added
        raise UserError(f"model.mtp.layers={new.mtp.layers}: the weights have {old.mtp.layers}; remove the override")


def _validation_text(config: Config, tokenizer: Tokenizer) -> Tensor:
    """Validation sequences [B, S], from each corpus in proportion to its training weight."""
    import torch

    from dynmoe.data.corpus import by_domain, open_corpora
    from dynmoe.data.validation import apportion, training_shares

    length = config.data.sequence_length
    corpora = open_corpora(config.data.dirs, length)
    if not corpora[0].tokenizer.encodes_like(tokenizer):
        raise UserError(
            f"data.dirs: {corpora[0].path} was encoded with another tokenizer; use corpora of the run's tokenizer"
        )
    domains = by_domain(corpora)
    limits = {name: corpus.sequences("validation", length) for name, corpus in domains.items()}
    total = min(max(_SEQUENCES, len(domains)), sum(limits.values()))
    tokens: list[int] = []
    for name, rows in apportion(total, training_shares(corpora, config.data.weights), limits).items():
        documents = domains[name].splits["validation"].documents()
        tokens += islice(chain.from_iterable(documents), rows * length)
    return torch.tensor(tokens).view(total, length)


def _copy(old: Decoder, new: Decoder) -> None:
    """Copies the parameters and buffers that exist in both under the same name."""
    import torch

    known = {**dict(old.named_parameters()), **dict(old.named_buffers())}
    with torch.no_grad():
        for name, place in [*new.named_parameters(), *new.named_buffers()]:
            if name in known:
                place.copy_(known[name])


def fit_p(decoder: Decoder, tokens_BS: Tensor, experts_per_token: float) -> None:
    """Fits p of each top-p layer, first to last, to a mean of ``experts_per_token`` over the tokens."""
    import torch

    from dynmoe.moe.layer import capture_plans

    for layer in decoder.moe_layers:
        router = layer.router
        assert isinstance(router.spec, TopP)
        with capture_plans([layer]) as plans, torch.no_grad():
            _run_all_layers(decoder, tokens_BS)
        logits_TE = plans[0].logits_TE
        assert logits_TE is not None
        with torch.no_grad():
            for wanted in router.spec.budgets or [experts_per_token]:
                router.spec.fit(router.at(wanted), logits_TE, wanted)


def _run_all_layers(decoder: Decoder, tokens_BS: Tensor) -> None:
    """A forward pass, also of the layers that predict further tokens."""
    from dynmoe.data.batches import Batch

    ahead = Batch(tokens_BS, tokens_BS).looking_ahead(decoder.settings.mtp.layers).ahead
    decoder(tokens_BS, tokens_BS, ahead=[(own.tokens_BS, own.labels_BS) for own in ahead])


def _compare(old: Decoder, new: Decoder, tokens_BS: Tensor) -> tuple[float, float, float]:
    """Cross-entropy of both models in nats per predicted token, and the largest difference of the logits."""
    import torch
    import torch.nn.functional as F

    losses = []
    differences = []
    with torch.no_grad():
        for tokens_S in tokens_BS:  # one at a time, because logits are large
            both = [decoder(tokens_S[None])[0] for decoder in (old, new)]
            losses.append([float(F.cross_entropy(logits_SV[:-1], tokens_S[1:])) for logits_SV in both])
            differences.append(float((both[0] - both[1]).abs().max()))
    before, after = (sum(column) / len(losses) for column in zip(*losses, strict=True))
    return before, after, max(differences)


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m dynmoe.warmstart", description="Start a run from the weights of a dense or a top-k run."
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="directory of the trained run, of either engine")
    parser.add_argument("output", type=Path, metavar="OUT", help="directory of the new run")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="configuration fields, such as model.router.kind=top_any"
    )
    parser.add_argument("--experts", type=int, help="number of experts per MoE layer, for a dense run")
    slices = "number of experts that one feed-forward layer is split into; 1: whole copies"
    parser.add_argument("--granularity", type=int, default=1, help=slices)
    parser.add_argument("--experts-per-token", type=float, help="target for fitting p; default after top-k: its k")
    deviation = "scale of the differences between copies; does not change the output"
    parser.add_argument("--symmetry-break", type=float, default=_BREAK, help=deviation)
    given = parser.parse_intermixed_args()
    done = warm_start(**vars(given))
    mean = sum(done.experts_per_token) / len(done.experts_per_token)
    print(f"{given.output}: a {done.config.engine} run that starts from {given.run}.")
    print(
        f"On the same text: loss {done.loss:.4f}, before {done.loss_before:.4f}; logits differ by at most "
        f"{done.difference:.1e}; {mean:.2f} experts per token "
        f"(by layer: {', '.join(f'{k:.2f}' for k in done.experts_per_token)})."
    )
    print(f"Train it with: {done.config.training_command}")


if __name__ == "__main__":
    run_tool(main)
