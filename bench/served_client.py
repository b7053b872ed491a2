"""Answers the same requests with each model in turn; run by a Python with vLLM and without this project.

Reads JSON with ``models`` (name to folder; the first also runs in transformers), ``requests``, ``tokens``, ``rounds``,
``eager`` and ``vocab``. Prints the seconds of each round by name, and the first model's experts per token by layer.
"""

import json
import os
import random
import sys
import time
from collections.abc import Callable
from operator import attrgetter
from typing import Any

os.environ.update(VLLM_LOGGING_LEVEL="ERROR", VLLM_CPU_KVCACHE_SPACE="1", VLLM_DO_NOT_TRACK="1")
os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # for apply_model


def main() -> None:
    import torch
    from transformers import AutoModelForCausalLM
    from vllm import LLM, SamplingParams

    job = json.load(sys.stdin)
    torch.set_num_threads(1)
    generator = random.Random(0)
    prompts = [[generator.randrange(3, job["vocab"]) for _ in range(16)] for _ in range(job["requests"])]
    greedy = SamplingParams(temperature=0.0, max_tokens=job["tokens"], ignore_eos=True, detokenize=False)
    settings = {"trust_remote_code": True, "dtype": "float32", "enforce_eager": job["eager"], "max_model_len": 256}
    settings["enable_prefix_caching"] = False  # else the second round would reuse the first one's prefixes
    first = next(iter(job["models"]))

    def served(folder: str, **more: Any) -> tuple[Any, Callable[[], Any]]:
        model = LLM(folder, skip_tokenizer_init=True, **settings, **more)
        return model, lambda: model.generate([{"prompt_token_ids": p} for p in prompts], greedy, use_tqdm=False)

    ways = {name: served(folder)[1] for name, folder in job["models"].items()}
    model = AutoModelForCausalLM.from_pretrained(job["models"][first], trust_remote_code=True, dtype=torch.float32)
    batch = torch.tensor(prompts)
    length = {"max_new_tokens": job["tokens"], "min_new_tokens": job["tokens"], "do_sample": False}
    ways["transformers"] = lambda: model.generate(batch, attention_mask=torch.ones_like(batch), **length)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(job["rounds"] + 1):
        for name in generator.sample(list(ways), len(ways)):
            start = time.perf_counter()
            ways[name]()
            if turn:  # the first round is a warm-up
                seconds[name].append(time.perf_counter() - start)
    counting, ask = served(job["models"][first], hf_overrides={"count_experts": True})
    counts = attrgetter("model.expert_counts")  # a function of this file cannot be sent to vLLM's processes
    (before,) = counting.apply_model(counts)
    ask()
    (after,) = counting.apply_model(counts)
    experts = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in zip(before, after, strict=True)]
    print(json.dumps(seconds), flush=True)
    print(json.dumps(experts))


if __name__ == "__main__":
    main()
