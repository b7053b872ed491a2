"""What a model answers in transformers, and in what the answers of a client differ from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

TOKENS = 24
# Spaces, digits, line ends, and characters that are in no piece, but bytes.
PROMPTS = ["The router takes", "# Document 7\nThe expert  counts 12 of the", " caf\u00e9 \u2014 the gate"]
SAME = "same"
_TOLERANCE = 1e-4  # of log-probabilities


@dataclass(frozen=True)
class Answer:
    """To one prompt, greedily.

    Attributes:
        prompt: ids that its text became.
        tokens: ids that were written.
        logprobs: of each of them, from the logits as the model gives them.
    """

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]


def ask_transformers(export: Path) -> list[Answer]:
    """The reference: fp32, on and on after the end of a text, as the clients are told to go."""
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
    """``same``: ids of the text and tokens are, and log-probabilities within 1e-4; or what is not, in a few words.

    Log-probabilities count as long as all tokens before them are the same. A client may give none.
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
    """The largest difference of log-probabilities of tokens that are the same, and follow the same."""
    largest = 0.0
    for place, logprob in enumerate(found.logprobs):
        if found.tokens[: place + 1] != expected.tokens[: place + 1]:
            break
        largest = max(largest, abs(logprob - expected.logprobs[place]) if math.isfinite(logprob) else math.inf)
    return largest
