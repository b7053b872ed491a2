"""Text to a sentencepiece model and Megatron .bin/.idx files, with a manifest. Start it with python -m data_prep."""
