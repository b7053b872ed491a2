"""Prepared corpora, their tokenizer, and batches whose order does not depend on the number of ranks."""

PREPARE_AGAIN = "prepare the corpus again"
