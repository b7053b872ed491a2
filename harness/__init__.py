"""Helpers that tests and benchmarks share: trainings as processes, comparisons of runs, counts and measurements."""
