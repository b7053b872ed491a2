"""Import from and export to Hugging Face formats, and the modeling code shipped with the weights (``*_dynmoe.py``)."""

from dynmoe.hf.command import main

__all__ = ["main"]
