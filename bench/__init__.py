"""Benchmarks that can be run again: python -m bench NAME --json FILE."""
