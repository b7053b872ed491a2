"""Converts text to a sentencepiece model and Megatron .bin/.idx files with a manifest: python -m data_prep."""
