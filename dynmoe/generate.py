"""Continues texts with the model of a run: python -m dynmoe.generate RUN --prompt TEXT

Shape suffix L: MoE layers.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dynmoe.cli import run_tool
from dynmoe.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from dynmoe.data.tokenizer import Tokenizer
    from dynmoe.model.sampling import Sampling
    from dynmoe.routing import RoutingPlan
    from dynmoe.trained import TrainedModel


@dataclass(frozen=True)
class Step:
    """Result of one forward pass for each text.

    Attributes:
        tokens: the sampled tokens; None for a text that has ended.
        experts_LBS: experts per token of the forward pass, int64 [MoE layers, B, S]: of the prompts, padded on the
            left, in the first pass, and of the previously sampled tokens afterwards.
        plans: the routing of the same tokens, by MoE layer.
    """

    tokens: list[int | None]
    experts_LBS: Tensor
    plans: Sequence[RoutingPlan]


def generate(
    model: TrainedModel, prompts: Sequence[str], num_tokens: int, sampling: Sampling, seed: int = 0
) -> Iterator[Step]:
    """Continues a batch of prompts, each until its document ends or ``num_tokens`` are sampled.

    Each prompt is the beginning of a document.

    Raises:
        UserError: a prompt and its continuation are longer than a training sequence.
    """
    longest = model.config.data.sequence_length
    encoded = encode(model, prompts)
    for prompt in encoded:
        if len(prompt) >= longest:
            problem = f"has {len(prompt)} tokens with the end of the document before it"
            raise UserError(f"--prompt: {problem}, but data.sequence_length is {longest}; shorten it")
        if len(prompt) + num_tokens > longest:
            problem = f"with a prompt of {len(prompt)} tokens exceeds data.sequence_length ({longest}), the positions"
            raise UserError(f"--tokens={num_tokens}: {problem} that were trained; use at most {longest - len(prompt)}")
    yield from continue_tokens(model, encoded, num_tokens, sampling, seed)


def encode(model: TrainedModel, prompts: Sequence[str]) -> list[list[int]]:
    """The tokens of prompts, each after the end of another document."""
    return [[model.tokenizer.eod, *model.tokenizer.encode(prompt)] for prompt in prompts]


def continue_tokens(
    model: TrainedModel, prompts: Sequence[Sequence[int]], num_tokens: int, sampling: Sampling, seed: int = 0
) -> Iterator[Step]:
    """Continues a batch of prompts given as tokens, none of them empty (see :func:`generate`)."""
    import torch

    from dynmoe.model.sampling import pad_left, sample, with_cache
    from dynmoe.moe.layer import capture_plans

    tokenizer = model.tokenizer
    tokens_BS, padding_B = pad_left(prompts, tokenizer.eod)
    tokens_BS = tokens_BS.to(model.device)
    padding_B = padding_B.to(model.device)
    ended = [False] * len(prompts)
    with capture_plans(model.decoder.moe_layers) as plans:
        next_logits = with_cache(model.decoder, padding_B)
        for drawn_B in sample(
            next_logits, tokens_BS, num_tokens, vocab_size=tokenizer.vocab_size, sampling=sampling, seed=seed
        ):
            ended = [over or token == tokenizer.eod for over, token in zip(ended, drawn_B.tolist(), strict=True)]
            counts = [plan.experts_per_token_T.cpu().view(len(prompts), -1) for plan in plans]
            experts_LBS = torch.stack(counts) if counts else drawn_B.new_zeros(0, len(prompts), 0)
            drawn = [None if over else token for over, token in zip(ended, drawn_B.tolist(), strict=True)]
            yield Step(drawn, experts_LBS, list(plans))
            plans.clear()
            if all(ended):
                return


class TextTrace:
    """Collects the routing of generated texts; in the trace that it writes, text b is sample b.

    The last sampled token of a text has no row, as no forward pass has computed its experts.

    Args:
        model: the model.
        prompts: the prompts as tokens.
    """

    def __init__(self, model: TrainedModel, prompts: Sequence[Sequence[int]]) -> None:
        self._model = model
        self._texts = [list(prompt) for prompt in prompts]
        longest = max(map(len, prompts))
        self._padding = [longest - len(prompt) for prompt in prompts]
        self._lengths: list[int] = []  # of the texts without their last tokens
        self._passes: list[list[Tensor]] = []  # gates [B, S, E] of each layer

    def watch(self, steps: Iterator[Step]) -> Iterator[Step]:
        """Yields ``steps``, those of :func:`continue_tokens`, and collects them."""
        for step in steps:
            # Gates of routes may be 0, so the others become NaN.
            gates = [plan.gates_TE.masked_fill(~plan.routing_map_TE, float("nan")).cpu() for plan in step.plans]
            self._passes.append([gates_TE.view(len(self._texts), -1, gates_TE.shape[1]) for gates_TE in gates])
            self._lengths = [len(text) for text in self._texts]
            for text, token in zip(self._texts, step.tokens, strict=True):
                if token is not None:
                    text.append(token)
            yield step

    def write(self, directory: Path) -> None:
        """Writes the trace into the folder of the model's step below ``directory``."""
        import torch

        from dynmoe.train.traces import step_directory, trace_table, write_tables

        places = [(b, position) for b, length in enumerate(self._lengths) for position in range(length)]
        sample_T, position_T = torch.tensor(places).unbind(1)
        token_T = torch.tensor([self._texts[b][position] for b, position in places])
        column_T = position_T + torch.tensor(self._padding)[sample_T]
        tables = []
        for layer, passes in zip(self._model.config.model.moe_layers, zip(*self._passes, strict=True), strict=True):
            gates_TE = torch.cat(passes, dim=1)[sample_T, column_T]
            token_N, expert_N = (~gates_TE.isnan()).nonzero(as_tuple=True)
            none = (sample_T[:0], sample_T[:0])
            columns = sample_T, position_T, token_T, (token_N, expert_N), gates_TE[token_N, expert_N], none
            tables.append(trace_table(self._model.step, layer, *columns))
        write_tables(step_directory(directory, self._model.step), 0, tables)


class _Text:
    """A growing text that is printed in parts of complete characters."""

    def __init__(self, model: TrainedModel, prompt: str) -> None:
        self._tokenizer = model.tokenizer
        self.tokens = model.tokenizer.encode(prompt)
        self._shown = 0

    def more(self) -> str:
        """The new text since the last call; bytes of an incomplete character are kept for the next call."""
        text = self._tokenizer.decode(self.tokens)
        end = len(text.rstrip("\ufffd"))
        new = text[self._shown : end]
        self._shown = max(self._shown, end)
        return new


def stream(model: TrainedModel, prompt: str, steps: Iterator[Step]) -> Iterator[str]:
    """Yields one text in parts while it is sampled, the prompt first."""
    text = _Text(model, prompt)
    yield text.more()
    for step in steps:
        (token,) = step.tokens
        if token is not None:
            text.tokens.append(token)
            yield text.more()


def stream_with_experts(model: TrainedModel, prompt: str, steps: Iterator[Step]) -> Iterator[str]:
    """Yields each piece of the text followed by its experts per token, averaged over layers: ``the[2.25]``.

    The experts of a token are known after the forward pass that follows its sampling, so the last token has none. A
    character that consists of several byte tokens is followed by the experts of each: ``é[2.25][2.00]``.
    """
    tokenizer = model.tokenizer
    waiting = list(tokenizer.encode(prompt))
    tokens = []  # of incomplete characters
    shown = []  # annotations of these tokens
    for step in steps:
        mean_S = step.experts_LBS[:, 0].float().mean(dim=0).tolist()[-len(waiting) :] if waiting else []
        tokens += waiting
        shown += [f"[{mean:.2f}]" for mean in mean_S]
        whole = len(tokens) - tokenizer.unfinished(tokens)
        yield from _annotated(tokenizer, tokens[:whole], shown)
        tokens = tokens[whole:]
        shown = shown[whole:]
        waiting = [token for token in step.tokens if token is not None]
    yield from _annotated(tokenizer, tokens + waiting, [*shown, *("" for _ in waiting)])


def _annotated(tokenizer: Tokenizer, tokens: list[int], shown: list[str]) -> Iterator[str]:
    """Yields the text of the tokens, each piece followed by the annotations of its tokens."""
    place = 0
    for text, length in tokenizer.written(tokens):
        yield text + "".join(shown[place : place + length])
        place += length


def main() -> None:
    parser = argparse.ArgumentParser("python -m dynmoe.generate", description="Continues texts with a run's model.")
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory, of either engine")
    parser.add_argument("--prompt", action="append", default=[], help="text to continue; may be given several times")
    parser.add_argument("--file", type=Path, help="file with one prompt per line")
    parser.add_argument("--tokens", type=int, default=96, help="maximum number of new tokens (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: greedy decoding (default: %(default)s)")
    parser.add_argument(
        "--top-k", type=int, default=40, help="number of most likely tokens to sample from; 0: all (40)"
    )
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="probability mass of the tokens to sample from (default: 1)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling (default: 0)")
    parser.add_argument(
        "--experts-per-token", type=float, metavar="K",
        help="budget, in the range of model.router.budgets (default: budget.experts_per_token of the run)",
    )  # fmt: skip
    parser.add_argument("--show-experts", action="store_true", help="print experts per token, averaged over layers")
    parser.add_argument("--trace", type=Path, metavar="DIR", help="write the experts of all tokens as a routing trace")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    given = parser.parse_args()
    prompts = _prompts(given)
    _check(given, len(prompts))
    import torch

    from dynmoe.model.sampling import Sampling
    from dynmoe.trained import open_trained

    device = None if given.device is None else torch.device(given.device)
    model = open_trained(given.run, device, given.experts_per_token)
    for option in ("--show-experts", "--trace"):
        if getattr(given, option[2:].replace("-", "_")) and not model.decoder.moe_layers:
            raise UserError(f"{option}: the model of {given.run} is dense; remove the option")
    sampling = Sampling(given.temperature, given.top_k, given.top_p)
    steps = generate(model, prompts, given.tokens, sampling, given.seed)
    trace = None if given.trace is None else TextTrace(model, encode(model, prompts))
    _print(model, prompts, steps if trace is None else trace.watch(steps), given.show_experts)
    if trace is not None:
        trace.write(given.trace)


def _print(model: TrainedModel, prompts: Sequence[str], steps: Iterator[Step], show_experts: bool) -> None:
    if len(prompts) == 1:
        show = stream_with_experts if show_experts else stream
        for part in show(model, prompts[0], steps):
            print(part, end="", flush=True)
        print()
        return
    texts = [_Text(model, prompt) for prompt in prompts]
    for step in steps:
        for text, token in zip(texts, step.tokens, strict=True):
            text.tokens += [] if token is None else [token]
    for number, text in enumerate(texts, 1):
        print(f"--- {number}\n{text.more()}")


def _prompts(given: argparse.Namespace) -> list[str]:
    prompts = list(given.prompt)
    if given.file is not None:
        try:
            prompts += given.file.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--file: {given.file} cannot be read: {error}; name a text file in UTF-8") from None
    return prompts or [""]


def _check(given: argparse.Namespace, prompts: int) -> None:
    """Refuses options that are out of range."""
    limits = {"tokens": (1, 10**9), "temperature": (0.0, 1e9), "top_k": (0, 10**9)}
    for name, (least, most) in limits.items():
        value = getattr(given, name)
        if not least <= value <= most:
            raise UserError(f"--{name.replace('_', '-')}={value}: is out of range; use {least} to {most:g}")
    if not 0 < given.top_p <= 1:
        raise UserError(f"--top-p={given.top_p}: is out of range; use a number above 0 and at most 1")
    if given.trace is not None and not given.trace.parent.is_dir():
        raise UserError(
            f"--trace={given.trace}: {given.trace.parent} is not a directory; create it, or use another path"
        )
    if given.device is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", given.device):
        raise UserError(f"--device={given.device}: is not known; use cpu, cuda or cuda:N")
    if given.show_experts and prompts > 1:
        raise UserError(f"--show-experts: supports one prompt, but {prompts} are given; give one")


if __name__ == "__main__":
    run_tool(main)
