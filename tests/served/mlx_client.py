"""Answers of mlx-lm; runs in an environment with mlx-lm and without this project.

The argument is a JSON file with ``models`` (name to folder), ``prompts`` and the number of ``tokens`` to generate for
each. Prints a JSON line per model when it is done: ``name``, ``versions``, and ``error`` or ``answers``.
"""

import json
import sys
from importlib.metadata import version


def ask(folder, job):
    import mlx.core as mx
    from mlx_lm import load
    from mlx_lm.generate import generate_step

    mx.set_default_device(mx.cpu)
    model, tokenizer = load(folder)
    answers = []
    for text in job["prompts"]:
        prompt = tokenizer.encode(text)
        steps = list(generate_step(mx.array(prompt), model, max_tokens=job["tokens"]))
        chosen = [logprobs[token].item() for token, logprobs in steps]
        answers.append({"prompt": list(prompt), "tokens": [token for token, _ in steps], "logprobs": chosen})
    return {"answers": answers}


def main():
    with open(sys.argv[1]) as stream:
        job = json.load(stream)
    versions = {name: version(name) for name in ("mlx-lm", "mlx")}
    for name, folder in job["models"].items():
        try:
            said = ask(folder, job)
        except Exception as error:
            said = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps({"name": name, "versions": versions, **said}), flush=True)


if __name__ == "__main__":
    main()
