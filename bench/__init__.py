"""Repeatable benchmarks: python -m bench NAME --json FILE."""
