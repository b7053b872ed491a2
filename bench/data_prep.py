"""Benchmark 21: data_prep in one process, compared with sentencepiece alone on the same text.

Our time includes everything: reading JSON lines, hashing twice, encoding, writing the part. Its word cache starts
empty.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.report import verdict
from data_prep.encode import WordEncoder, encode_unit
from data_prep.recipe import Recipe
from data_prep.sources import STDLIB, RefusedError, list_units, read_unit, text_of
from data_prep.vocabulary import train_tokenizer
from dynmoe.data.tokenizer_files import open_tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--source", default=STDLIB, help="text source, as for data_prep")
    parser.add_argument("--megabytes", type=int, default=48, help="maximum amount of text")
    parser.add_argument("--vocab-sizes", type=int, nargs="+", default=[4096, 32000])
    parser.add_argument("--repeats", type=int, default=5)


def run(given: argparse.Namespace) -> list[dict[str, Any]]:
    texts = texts_of(given.source, given.megabytes)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.jsonl"
        model = Path(folder) / "tokenizer.model"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        units = list_units([str(path)])
        for vocab_size in given.vocab_sizes:
            model.write_bytes(train_tokenizer(Recipe([str(path)], vocab_size=vocab_size), units))
            tokenizer = open_tokenizer(model)
            for text in texts[:200]:
                assert WordEncoder(tokenizer).encode(text).tolist() == tokenizer.encode(text)
            speeds: dict[str, list[float]] = {"ours": [], "sentencepiece": []}
            for _ in range(given.repeats):
                started = time.perf_counter()
                encoder = WordEncoder(tokenizer)
                for number, unit in enumerate(units):
                    part = encode_unit(unit, "text", 0.02, encoder, tokenizer.eod)
                    part.write(Path(folder) / f"{number}.npz")
                speeds["ours"].append(megabytes / (time.perf_counter() - started))
                started = time.perf_counter()
                for text in texts:
                    tokenizer.encode(text)
                speeds["sentencepiece"].append(megabytes / (time.perf_counter() - started))
            ratio = statistics.median(a / b for a, b in zip(*speeds.values(), strict=True))
            row = {"text": given.source, "megabytes": round(megabytes, 1), "vocab_size": vocab_size}
            medians = {f"{name}_mb_per_s": statistics.median(values) for name, values in speeds.items()}
            rows.append({**row, **medians, "times_sentencepiece": ratio})
    return rows


def texts_of(source: str, megabytes: int) -> list[str]:
    """The documents of a source, up to about this much."""
    texts = []
    budget = megabytes * 1_000_000
    for unit in list_units([source]):
        for document in read_unit(unit, "text"):
            try:
                text = text_of(document)
            except RefusedError:
                continue
            if budget > 0:
                texts.append(text)
                budget -= len(document.content)
    return texts


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """Requires at least the library's own speed, or 8 MB/s."""
    return [
        verdict(f"{row['vocab_size']} pieces: share of the lower of 8 MB/s and sentencepiece's own", needed, 1.0)
        for row in rows
        for needed in [min(8.0, row["sentencepiece_mb_per_s"]) / row["ours_mb_per_s"]]
    ]
