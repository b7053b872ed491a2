"""Reference answers of transformers, and how the answers of a client differ from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

TOKENS = 24
# Spaces, digits, line breaks, and characters that are encoded as bytes.
PROMPTS = ["The router takes", "# Document 7\nThe expert  counts 12 of the", " caf\u00e9 \u2014 the gate"]
SAME = "same"
_TOLERANCE = 1e-4  # of log-probabilities


@dataclass(frozen=True)
class Answer:
    """The greedy answer to one prompt.

    Attributes:
        prompt: ids of the prompt.
        tokens: generated ids.
        logprobs: log-probability of each generated token, from the model's raw logits.
    """

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]


def ask_transformers(export: Path) -> list[Answer]:
    """Generates the reference in fp32, continuing after EOD as the clients do."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(export, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(export, trust_remote_code=True, dtype=torch.float32).eval()
    model.generation_config = GenerationConfig(max_new_tokens=TOKENS, pad_token_id=0)
    answers = []
    for text in PROMPTS:
        batch = tokenizer(text, return_tensors="pt")
        out = model.generate(**batch, output_logits=True, return_dict_in_generate=True)
        prompt = batch["input_ids"][0]
        tokens = out.sequences[0, len(prompt) :]
        logprobs = torch.cat(out.logits).log_softmax(dim=-1).gather(1, tokens[:, None]).flatten()
        answers.append(Answer(prompt.tolist(), tokens.tolist(), logprobs.tolist()))
    return answers


def difference(found: Sequence[Answer], expected: Sequence[Answer]) -> str:
    """``same`` if prompt ids and tokens are equal and log-probabilities agree within 1e-4, else a short description.

    Log-probabilities are compared as long as all tokens before them are the same. A client may omit them.
    """
    pairs = list(zip(found, expected, strict=True))
    if ids := sum(a.prompt != b.prompt for a, b in pairs):
        return f"other ids of the text ({ids} of {len(pairs)})"
    said = []
    if tokens := sum(a.tokens != b.tokens for a, b in pairs):
        said.append(f"other tokens ({tokens} of {len(pairs)})")
    off = max(_off(a, b) for a, b in pairs)
    if not off <= _TOLERANCE:
        said.append(f"log-probabilities {off:.1g} off")
    return ", ".join(said) or SAME


def _off(found: Answer, expected: Answer) -> float:
    """The largest difference of log-probabilities within the common prefix."""
    largest = 0.0
    for place, logprob in enumerate(found.logprobs):
        if found.tokens[: place + 1] != expected.tokens[: place + 1]:
            break
        largest = max(largest, abs(logprob - expected.logprobs[place]) if math.isfinite(logprob) else math.inf)
    return largest
