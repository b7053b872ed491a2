"""Evaluation: tasks of lm-evaluation-harness and domains, each with the experts that its tokens used."""

from dynmoe.evaluate.command import main

__all__ = ["main"]
