"""python -m data_prep [SOURCE ...] --out DIR, and python -m data_prep verify DIR."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from data_prep.build import Recipe, build, is_current
from data_prep.sources import STDLIB
from dynmoe.cli import run_tool
from dynmoe.data.corpus import MANIFEST, Corpus
from dynmoe.errors import UserError


def main() -> None:
    arguments = sys.argv[1:]
    if arguments and arguments[0] == "verify":
        _verify(arguments[1:])
    else:
        _build(arguments)


def _verify(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m data_prep verify", description="Checks a corpus: structure, hashes, ids."
    )
    parser.add_argument("dir", type=Path)
    corpus = Corpus.open(parser.parse_args(arguments).dir)
    corpus.verify()
    for split, tokens in corpus.splits.items():
        print(f"{split}: {tokens.num_documents} documents, {tokens.num_tokens} tokens, sound")


def _build(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m data_prep",
        description="Text to a tokenizer and Megatron .bin/.idx files. 'verify DIR' checks what it wrote.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "sources", nargs="*", default=[STDLIB],
        help="text files, folders, .jsonl (.gz, .zst), or 'stdlib': the source of the running Python's library",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("data/stdlib"), help="directory of the corpus")
    parser.add_argument("--json-key", default="text", help="field of a JSONL line that holds the text")
    parser.add_argument("--vocab-size", type=int, default=4096, help="pieces of the tokenizer to train")
    parser.add_argument("--tokenizer", help="an existing sentencepiece model, in place of training one")
    parser.add_argument("--tokenizer-mb", type=int, default=16, help="megabytes of text to train the tokenizer on")
    parser.add_argument("--validation-fraction", type=float, default=0.02, help="share of documents for validation")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--overwrite", action="store_true", help="replace a corpus made in another way")
    given = parser.parse_args(arguments)
    recipe = Recipe(
        given.sources, given.json_key, given.vocab_size, given.tokenizer, given.tokenizer_mb, given.validation_fraction
    )
    if given.workers < 1:
        raise UserError(f"--workers {given.workers}: use at least 1")
    out: Path = given.out
    for source in given.sources:
        if source != STDLIB and out.resolve().is_relative_to(Path(source).resolve()):
            raise UserError(f"--out {out}: lies inside the source {source}, which would read it; name a place outside")
    if out.exists() and not (out / MANIFEST).exists():
        raise UserError(f"--out {out}: exists and is no corpus; name another directory")
    if out.exists() and not given.overwrite:
        if is_current(recipe, out):
            print(f"{out} is up to date")
            return
        raise UserError(f"--out {out}: holds a corpus made from other text or options; pass --overwrite to replace it")
    _report(out, build(recipe, out, given.workers))


def _report(out: Path, manifest: dict[str, Any]) -> None:
    for split, facts in manifest["splits"].items():
        print(
            f"{split}: {facts['documents']} documents, {facts['text_bytes'] / 1e6:.1f} MB of text, "
            f"{facts['tokens']} tokens, unigram entropy {facts['unigram_entropy_nats']:.3f} nats"
        )
    for reason, count in manifest["refused"]["counts"].items():
        names = manifest["refused"]["first_names"][reason]
        print(f"left out, {reason}: {count} ({', '.join(names[:5])}{', …' if count > 5 else ''})")
    print(f"written to {out}")


if __name__ == "__main__":
    run_tool(main)
