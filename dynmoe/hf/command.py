"""The commands: models out, as directories and as files, and in."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_EXPORT = "Writes a run's newest checkpoint as a model of transformers."
_GGUF = "Writes a run's newest checkpoint as one file for llama.cpp."
_IMPORT = "Makes a run that begins from a checkpoint of others, or from an export."


def main() -> None:
    parser = argparse.ArgumentParser("python -m dynmoe.hf", description="Models in and out of Hugging Face's formats.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    out = verbs.add_parser("export", help=_EXPORT, description=_EXPORT)
    out.add_argument("run", type=Path, metavar="RUN", help="directory of the run, of either engine")
    out.add_argument("output", type=Path, metavar="OUT", help="directory of the model")
    out.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the weights")
    out.add_argument(
        "--own-code", action="store_true",
        help="our modeling code, with experts per token in its outputs, also where transformers has the architecture",
    )  # fmt: skip
    file = verbs.add_parser("gguf", help=_GGUF, description=_GGUF)
    file.add_argument("run", type=Path, metavar="RUN", help="directory of the run, of either engine")
    file.add_argument("output", type=Path, metavar="FILE", help="of the model, by custom FILE.gguf")
    file.add_argument("--type", default="f32", metavar="TYPE", help="of the matrices: f32 (default), bf16 or q8_0")
    into = verbs.add_parser("import", help=_IMPORT, description=_IMPORT)
    into.add_argument("source", type=Path, metavar="DIR", help="directory with config.json and .safetensors")
    into.add_argument("run", type=Path, metavar="RUN", help="directory of the new run")
    into.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="engine=megatron, data.dirs=[...] and the like")
    given = parser.parse_args()
    if given.verb == "export":
        _export(given)
    elif given.verb == "gguf":
        _gguf(given)
    else:
        _import(given)


def _export(given: argparse.Namespace) -> None:
    import torch

    from dynmoe.hf.export import export

    done = export(given.run, given.output, getattr(torch, given.dtype), given.own_code)
    code = ", trust_remote_code=True" if done.architecture == "dynmoe" else ""
    print(f"{given.output}: {done.parameters / 1e6:.1f} M parameters as {done.architecture}.")
    if not done.tokenizer:
        print("It has no tokenizer, as the checkpoint that was imported had none.")
    elif done.texts:
        print(f"The tokenizer gives sentencepiece's ids on {done.texts} documents of the validation text.")
    else:
        print("The tokenizer was not compared with sentencepiece: the corpora of data.dirs are not here.")
    print(f'Read it with: AutoModelForCausalLM.from_pretrained("{given.output}"{code})')
    print(f"{_readers(json.loads((given.output / 'config.json').read_text()))} How to serve it: docs/serving.md")


def _readers(exported: Mapping[str, Any]) -> str:
    """Who reads an export with this ``config.json`` and who does not, as ``make test-served`` measures it."""
    if exported["model_type"] == "dynmoe":
        return "transformers and vLLM read it; mlx-lm and llama.cpp do not."
    gguf = "for llama.cpp there is python -m dynmoe.hf gguf."
    if exported["model_type"] == "qwen2_moe" and exported["mlp_only_layers"]:
        return "transformers and vLLM read it; mlx-lm and llama.cpp do not, as not every layer has experts."
    if exported["model_type"] == "qwen2_moe" and exported["norm_topk_prob"]:
        return f"transformers and vLLM read it; mlx-lm does not make its gates sum to 1; {gguf}"
    return f"transformers, vLLM and mlx-lm read it; {gguf}"


def _gguf(given: argparse.Namespace) -> None:
    from dynmoe.hf.gguf import write_gguf

    done = write_gguf(given.run, given.output, given.type)
    size = f"{done.parameters / 1e6:.1f} M parameters in {done.size / 1e6:.1f} MB"
    print(f"{given.output}: {size} ({given.type}), as {done.architecture} of llama.cpp, with the tokenizer.")


def _import(given: argparse.Namespace) -> None:
    from dynmoe.hf.importing import import_checkpoint
    from dynmoe.train.run_directory import RunDirectory

    maker, config = import_checkpoint(given.source, given.run, given.overrides)
    print(f"{given.run}: a run of {config.engine} that begins with the weights of {given.source} ({maker}).")
    tokenizer = RunDirectory(given.run).tokenizer
    if tokenizer.exists():
        print(f"Prepare text for it with: python -m data_prep ... --tokenizer {tokenizer}")
    else:
        print(f"{given.source} has no {tokenizer.name} of sentencepiece, with which text for it could be prepared.")
    print(f"Train it with: torchrun train.py {given.run / 'config.yaml'}")
