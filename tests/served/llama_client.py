"""Answers of llama.cpp; runs in an environment with xllamacpp and without this project.

The argument is a JSON file with ``models`` (name to GGUF file), ``prompts`` and the number of ``tokens`` to generate.
Optional are ``texts`` to tokenize, and ``exact`` (false: llama.cpp's default types of keys and values). Prints a JSON
line per model when it is done: ``name``, ``versions``, and ``error``, or ``answers`` and ``ids``.
"""

import json
import math
import sys
import urllib.request
from importlib.metadata import version


def ask(file, job):
    """Returns the answers of one model."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = file
    settings.n_ctx = 256
    settings.n_parallel = 1
    settings.warmup = False
    # One thread, because several threads busy-wait for each other on a loaded machine.
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    if job.get("exact", True):  # by default they are fp16, and flash attention rounds them anyway
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
        prompt = ids_of(text)
        tokens = []
        logprobs = []
        while len(tokens) < job["tokens"]:  # it stops at EOD; continue from there
            wanted = {"n_predict": job["tokens"] - len(tokens), "temperature": 0.0, "n_probs": 1, "return_tokens": True}
            said = post("/completion", prompt=prompt + tokens, **wanted)
            if not said["tokens"]:
                raise RuntimeError(f"no token after {len(tokens)}: {said['content']!r}")
            steps = said.get("completion_probabilities", [])
            given = [math.nan if step["logprob"] is None else step["logprob"] for step in steps]
            whole = len(given) == len(said["tokens"]) and len(logprobs) == len(tokens)
            logprobs += given if whole else []  # tokens that are part of a character have none
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
