"""Tasks in local files, and what ranks score."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml

from dynmoe.engines import make_engine
from dynmoe.evaluate.models import ModelInTraining
from dynmoe.evaluate.scoring import ExpertUse, Passage, score
from tests.engines.cases import VOCAB, config_for
from tests.texts import make_text

NOUNS = ["router", "expert", "token", "layer"]
CHOICES = {
    "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_target": "gold",
    "doc_to_choice": "{{choices}}",
    "metric_list": [
        {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
    ],
}  # fmt: skip
ROLLING = {
    "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
    "metric_list": [
        {"metric": metric, "aggregation": "weighted_perplexity",
         "higher_is_better": False}
        for metric in ("word_perplexity", "byte_perplexity")
    ],
}  # fmt: skip
WRITING = {
    "output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{choices[gold]}}",
    "generation_kwargs": {"until": ["."], "max_gen_toks": 9, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    "filter_list": [{"name": "stripped", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}],
}  # fmt: skip


def write_tasks(folder: Path) -> dict[str, str]:
    """YAML files of three tasks, one of a group of two of them, by name."""
    folder.mkdir(parents=True, exist_ok=True)
    questions = [
        {"question": f"The {noun} takes {number} of the", "choices": [f" {own}s." for own in NOUNS], "gold": number % 4}
        for number, noun in enumerate(NOUNS * 3)
    ]
    # Longer than a window, shorter than one, and of several windows.
    texts = [{"text": make_text(number, sentences)} for number, sentences in enumerate((1, 4, 12))]
    for name, lines, task in (
        ("choices", questions, CHOICES), ("rolling", texts, ROLLING), ("writing", questions[:5], WRITING)
    ):  # fmt: skip
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(line) + "\n" for line in lines))
        head = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}},
                "test_split": "test"}  # fmt: skip
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(head | task))
    (folder / "both.yaml").write_text(yaml.safe_dump({"group": "both", "task": ["choices", "rolling"]}))
    return {path.stem: str(path) for path in folder.glob("*.yaml")}


def some_passages(vocab_size: int, longest: int) -> list[Passage]:
    """Of two groups, of many lengths."""
    generator = torch.Generator().manual_seed(3)
    passages = []
    for number in range(11):
        length = int(torch.randint(2, longest + 2, (1,), generator=generator))
        tokens = torch.randint(3, vocab_size, (length,), generator=generator).tolist()
        passages.append(Passage(tokens, 1 + number % (length - 1), ("easy", "hard")[number % 2]))
    return passages


def score_passages(overrides: list[str]) -> dict[str, Any]:
    """Scores and experts by group of a model that has learnt nothing, spread as its configuration says."""
    config = config_for(*overrides)
    config.check_world(dist.get_world_size())
    engine = make_engine(config, VOCAB)
    model = ModelInTraining(engine, config, tokenizer=None, vocab_size=VOCAB)
    use = ExpertUse()
    passes = []
    passages = some_passages(VOCAB, config.data.sequence_length)
    scores = score(model, passages, use, lambda done, of: passes.append((done, of)))
    return {
        "log_probs": [own.log_prob for own in scores], "greedy": [own.greedy for own in scores], "passes": passes,
        "experts": [use.figures([group]) for group in ("easy", "hard")],
    }  # fmt: skip
