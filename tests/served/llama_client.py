"""What llama.cpp answers: run by the interpreter of an environment that has xllamacpp, and nothing of this project.

Its argument is a JSON file with ``models`` (name to GGUF file), ``prompts`` and ``tokens`` to write for each; ``texts``
that are only made ids of, and ``exact`` (false: keys and values as llama.cpp has them by default) may be left out. It
prints a JSON line for each model as soon as it has one: ``name``, ``versions``, and ``error``, or ``answers`` and
``ids``.
"""

import json
import math
import sys
import urllib.request
from importlib.metadata import version


def ask(file, job):
    """The answers of one model."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = file
    settings.n_ctx, settings.n_parallel, settings.warmup = 256, 1, False
    # One thread: on a busy machine several would wait for each other in a loop.
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    if job.get("exact", True):  # else keys and values are fp16, and flash attention rounds them even where they are not
        settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(settings)

    def post(path, **content):
        request = urllib.request.Request(server.listening_address + path, json.dumps(content).encode())
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=120) as reply:
            return json.load(reply)

    def ids_of(text):
        return post("/tokenize", content=text, add_special=True, parse_special=False)["tokens"]

    def answer(text):
        prompt, tokens, logprobs = ids_of(text), [], []
        while len(tokens) < job["tokens"]:  # it stops at the end of a text, and is told to go on from there
            wanted = {"n_predict": job["tokens"] - len(tokens), "temperature": 0.0, "n_probs": 1, "return_tokens": True}
            said = post("/completion", prompt=prompt + tokens, **wanted)
            if not said["tokens"]:
                raise RuntimeError(f"no token after {len(tokens)}: {said['content']!r}")
            steps = said.get("completion_probabilities", [])
            given = [math.nan if step["logprob"] is None else step["logprob"] for step in steps]
            whole = len(given) == len(said["tokens"]) and len(logprobs) == len(tokens)
            logprobs += given if whole else []  # none of tokens that are only a part of a character
            tokens += said["tokens"]
        return {"prompt": prompt, "tokens": tokens, "logprobs": logprobs}

    return {
        "answers": [answer(text) for text in job["prompts"]],
        "ids": [ids_of(text) for text in job.get("texts", [])],
    }


def main():
    with open(sys.argv[1]) as stream:
        job = json.load(stream)
    versions = {"xllamacpp": version("xllamacpp")}
    for name, file in job["models"].items():
        try:
            said = ask(file, job)
        except Exception as error:
            said = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps({"name": name, "versions": versions, **said}), flush=True)


if __name__ == "__main__":
    main()
