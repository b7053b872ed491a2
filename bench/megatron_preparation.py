"""The preparation of Megatron-LM's own tool, with its parts from Megatron-Core: JSON lines to .bin and .idx.

Workers parse a line, encode its text and append the end-of-text token; the main process writes, in order. Run as
python -m bench.megatron_preparation TEXT.jsonl TOKENIZER.model PREFIX WORKERS.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import warnings

import sentencepiece

_CHUNK = 32  # lines that a worker gets at a time, as in the tool

_processor: sentencepiece.SentencePieceProcessor


def _start(model: str) -> None:
    global _processor  # noqa: PLW0603  (one per worker process, set by the pool)
    _processor = sentencepiece.SentencePieceProcessor(model_file=model)


def _encode(line: str) -> list[int]:
    return [*_processor.encode(json.loads(line)["text"]), _processor.eos_id()]


def main(text: str, model: str, prefix: str, workers: int) -> None:
    warnings.filterwarnings("ignore")
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    size = sentencepiece.SentencePieceProcessor(model_file=model).vocab_size()
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(size))
    with open(text, encoding="utf-8") as lines, multiprocessing.Pool(workers, _start, (model,)) as pool:
        for tokens in pool.imap(_encode, lines, _CHUNK):
            builder.add_document(torch.tensor(tokens), [len(tokens)])
    builder.finalize(f"{prefix}.idx")


if __name__ == "__main__":
    given_text, given_model, given_prefix, given_workers = sys.argv[1:]
    main(given_text, given_model, given_prefix, int(given_workers))
