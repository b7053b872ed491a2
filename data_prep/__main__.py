"""python -m data_prep [SOURCE ...] --out DIR; also verify DIR, and adopt PREFIX for files of Megatron-LM's own tool."""

from __future__ import annotations

import argparse
import io
import os
import sys
from pathlib import Path
from typing import Any

from data_prep.adopt import adopt
from data_prep.build import build, is_current
from data_prep.formats import DECLARED
from data_prep.recipe import Nodes, Recipe
from data_prep.sources import STDLIB
from data_prep.tables import HUB
from data_prep.tiktoken_files import PATTERNS, read_tokenizer
from dynmoe.cli import Help, run_tool
from dynmoe.data.corpus import MANIFEST, Corpus
from dynmoe.data.tokenizer_files import open_tokenizer
from dynmoe.errors import UserError
from dynmoe.train.verification import verify_corpora


def main() -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # prints any file name or text, whatever the locale
    arguments = sys.argv[1:]
    if arguments[:1] == ["verify"]:
        _verify(arguments[1:])
    elif arguments[:1] == ["adopt"]:
        _adopt(arguments[1:])
    else:
        _build(arguments)


def _verify(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m data_prep verify",
        description="Checks a corpus: structure, hashes, token ids. Training then skips this check (data.verify=once).",
    )
    parser.add_argument("dir", type=Path, help="directory of the corpus")
    corpus = Corpus.open(parser.parse_args(arguments).dir)
    verify_corpora([corpus], "always")
    for split, tokens in corpus.splits.items():
        print(f"{split}: {tokens.num_documents} documents, {tokens.num_tokens} tokens, intact")


def _adopt(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m data_prep adopt",
        description="Makes a corpus from .bin/.idx files of Megatron-LM's own tool, without encoding again.",
        formatter_class=Help,
    )
    parser.add_argument("train", type=Path, metavar="PREFIX", help="path of the training files without .bin and .idx")
    parser.add_argument("--validation", type=Path, metavar="PREFIX", help="path of the validation files; default: use "
                        "the last training documents")  # fmt: skip
    parser.add_argument("--validation-fraction", type=float, default=0.02, help="share of documents for validation")
    parser.add_argument("--tokenizer", required=True, help="the tokenizer that encoded the tokens: a sentencepiece "
                        "model, a tokenizer.json or a tiktoken file, or a directory with one")  # fmt: skip
    _add_tokenizer_options(parser)
    parser.add_argument("--out", type=Path, required=True, help="directory for the corpus")
    given = parser.parse_args(arguments)
    if given.out.exists():
        raise UserError(f"--out {given.out}: exists; use another directory")
    if not 0.0 < given.validation_fraction < 1.0:
        raise UserError(f"--validation-fraction {given.validation_fraction}: use a number between 0 and 1")
    tokenizer = read_tokenizer(given.tokenizer, given.end_of_text, given.special_tokens, given.tiktoken_pattern)
    _report(given.out, adopt(given.train, given.validation, given.validation_fraction, tokenizer, given.out))


def _add_tokenizer_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--end-of-text", metavar="TOKEN", help="token that ends each document; default: the one that "
                        "its directory names (eos_token), or a well-known one such as <|endoftext|>")  # fmt: skip
    parser.add_argument("--special-tokens", action="store_true", default=None, help="encode the names of special "
                        "tokens in text, such as <|im_start|>, as these tokens; default: as text, or as the corpus or "
                        "run of the tokenizer does")  # fmt: skip
    parser.add_argument("--tiktoken-pattern", metavar="NAME", help="how a tiktoken file that is not known splits text: "
                        f"{', '.join(PATTERNS)}, or a regular expression")  # fmt: skip


def _build(arguments: list[str]) -> None:
    given = _parse_build(arguments)
    nodes = Nodes(given.nodes, given.node)
    recipe = _recipe(given)
    if given.workers < 1:
        raise UserError(f"--workers {given.workers}: use at least 1")
    out: Path = given.out
    for source in given.sources:
        if source != STDLIB and not source.startswith(HUB) and out.resolve().is_relative_to(Path(source).resolve()):
            raise UserError(f"--out {out}: lies inside the source {source}, which would read it; use a path outside")
    if out.exists() and not (out / MANIFEST).exists():
        raise UserError(f"--out {out}: exists and is not a corpus; use another directory")
    if out.exists() and not given.overwrite:
        if is_current(recipe, out, given.workers):
            print(f"{out} is up to date")
            return
        raise UserError(f"--out {out}: is a corpus made from other text or options; pass --overwrite to replace it")
    manifest = build(recipe, out, given.workers, nodes)
    if manifest is None:
        print(f"node {nodes.own} has encoded its part; node 0 writes {out}")
    else:
        _report(out, manifest)


def _parse_build(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m data_prep",
        description="Converts text to a tokenizer and Megatron .bin/.idx files. 'verify DIR' checks the result; "
        "'adopt PREFIX' uses files of Megatron-LM's own tool.",
        formatter_class=Help,
    )
    parser.add_argument(
        "sources", nargs="*", default=[STDLIB],
        help="files of text, JSON lines, other JSON, CSV or TSV, plain or compressed (gzip, Zstandard), Parquet files, "
        "folders of these, hf:DATASET[:CONFIGURATION[:SPLIT]] (streamed from the Hugging Face hub), or 'stdlib': the "
        "source code of Python's standard library. Each file's format is detected from content and name, and printed",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("data/stdlib"), help="directory for the corpus")
    parser.add_argument("--key", "--json-key", default="text", help="field or column that holds the text")
    parser.add_argument(
        "--as", dest="read_as", choices=DECLARED,
        help="format of every file except Parquet; text: each file is one document. Default: detected",
    )  # fmt: skip
    parser.add_argument(
        "--vocab-size", type=int, default=argparse.SUPPRESS,
        help=f"vocabulary size of the tokenizer to train (default: {Recipe.vocab_size})",
    )  # fmt: skip
    parser.add_argument("--tokenizer", help="existing tokenizer to use instead of training one: a sentencepiece model, "
                        "a tokenizer.json of Hugging Face or a tiktoken file, or a directory with one")  # fmt: skip
    _add_tokenizer_options(parser)
    parser.add_argument(
        "--tokenizer-mb", type=int, default=argparse.SUPPRESS,
        help=f"megabytes of text for training the tokenizer (default: {Recipe.tokenizer_mb})",
    )  # fmt: skip
    parser.add_argument("--validation-fraction", type=float, default=0.02, help="share of documents for validation")
    parser.add_argument("--keep-copies", action="store_true", help="keep documents that repeat an earlier text")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes on this node")
    parser.add_argument("--nodes", type=int, default=1, help="number of nodes that run this command together")
    parser.add_argument("--node", type=int, default=0, help="index of this node; node 0 merges the parts")
    parser.add_argument("--overwrite", action="store_true", help="replace a corpus made from other text or options")
    return parser.parse_args(arguments)


def _recipe(given: argparse.Namespace) -> Recipe:
    training = {name: value for name, value in vars(given).items() if name in ("vocab_size", "tokenizer_mb")}
    if training and given.tokenizer is not None:
        option = f"--{next(iter(training)).replace('_', '-')}"
        raise UserError(f"{option}: applies to a tokenizer that is trained; remove it, or --tokenizer")
    return Recipe(
        given.sources,
        given.key,
        tokenizer=given.tokenizer,
        validation_fraction=given.validation_fraction,
        deduplicate=not given.keep_copies,
        read_as=given.read_as,
        end_of_text=given.end_of_text,
        special_tokens=given.special_tokens,
        tiktoken_pattern=given.tiktoken_pattern,
        **training,
    )


def _report(out: Path, manifest: dict[str, Any]) -> None:
    for split, facts in manifest["splits"].items():
        # Tokens that were adopted have no text here.
        text = f"{facts['text_bytes'] / 1e6:.1f} MB of text, " if facts["text_bytes"] else ""
        print(
            f"{split}: {facts['documents']} documents, {text}{facts['tokens']} tokens, "
            f"unigram entropy {facts['unigram_entropy_nats']:.3f} nats"
        )
        if facts["unknown_tokens"]:
            share = facts["unknown_tokens"] / facts["tokens"]
            print(f"{split}: {share:.1%} of the tokens are unknown to the tokenizer; their text is lost")
    tokenizer = open_tokenizer(out)
    print(f"each document ends with the token {tokenizer.piece(tokenizer.eod)!r}, id {tokenizer.eod}")
    for reason, count in manifest["refused"]["counts"].items():
        names = manifest["refused"]["first_names"][reason]
        print(f"skipped, {reason}: {count} ({', '.join(names[:5])}{', …' if count > 5 else ''})")
    print(f"written to {out}")


if __name__ == "__main__":
    run_tool(main)
