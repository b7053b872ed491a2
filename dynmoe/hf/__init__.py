"""Models in and out of Hugging Face's formats; the modeling code that travels with the weights (``*_dynmoe.py``)."""

from dynmoe.hf.command import main

__all__ = ["main"]
