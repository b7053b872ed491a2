"""Prepared corpora, their tokenizer, and batches in an order that does not depend on the number of ranks."""
