"""The commands: export to transformers, export to GGUF, import."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_EXPORT = "Export the latest checkpoint of a run as a transformers model."
_GGUF = "Export the latest checkpoint of a run as a GGUF file for llama.cpp."
_IMPORT = "Create a run that starts from the weights of a transformers checkpoint, or of an export."


def main() -> None:
    parser = argparse.ArgumentParser("python -m dynmoe.hf", description="Hugging Face import and export.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    out = verbs.add_parser("export", help=_EXPORT, description=_EXPORT)
    out.add_argument("run", type=Path, metavar="RUN", help="directory of the run, of either engine")
    out.add_argument("output", type=Path, metavar="OUT", help="directory of the exported model; must not exist")
    dtypes = ("float32", "bfloat16", "float16")
    out.add_argument("--dtype", choices=dtypes, default="float32", help="data type of the weights")
    out.add_argument(
        "--own-code", action="store_true",
        help="export our modeling code, which outputs experts per token, even if transformers has the architecture",
    )  # fmt: skip
    file = verbs.add_parser("gguf", help=_GGUF, description=_GGUF)
    file.add_argument("run", type=Path, metavar="RUN", help="directory of the run, of either engine")
    file.add_argument("output", type=Path, metavar="FILE", help="the file to write, by convention FILE.gguf")
    file.add_argument("--type", default="f32", metavar="TYPE", help="type of the matrices: f32 (default), bf16 or q8_0")
    into = verbs.add_parser("import", help=_IMPORT, description=_IMPORT)
    into.add_argument("source", type=Path, metavar="DIR", help="directory with config.json and .safetensors files")
    into.add_argument("run", type=Path, metavar="RUN", help="directory of the new run; must not exist")
    into.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="configuration fields, such as engine=megatron")
    given = parser.parse_args()
    {"export": _export, "gguf": _gguf, "import": _import}[given.verb](given)


def _export(given: argparse.Namespace) -> None:
    import torch

    from dynmoe.hf.export import export

    done = export(given.run, given.output, getattr(torch, given.dtype), given.own_code)
    code = ", trust_remote_code=True" if done.architecture == "dynmoe" else ""
    print(f"{given.output}: {done.parameters / 1e6:.1f} M parameters as {done.architecture}.")
    if done.architecture != "deepseek_v3":
        _name_left_out(given.run)
    if not done.tokenizer:
        print("It has no tokenizer, because the imported checkpoint had none.")
    elif done.texts:
        print(f"The tokenizer gives the ids of training on {done.texts} validation documents.")
    else:
        print(
            "The tokenizer was not compared with that of training, because the corpora of data.dirs do not exist here."
        )
    print(f'Load it with: AutoModelForCausalLM.from_pretrained("{given.output}"{code})')
    print(f"{_readers(json.loads((given.output / 'config.json').read_text()))} How to serve it: docs/serving.md")


def _name_left_out(run: Path) -> None:
    from dynmoe.config import load_config

    if layers := load_config(run / "config.yaml").model.mtp.layers:
        print(f"Left out: the layers that predict further tokens ({layers}).")


def _readers(exported: Mapping[str, Any]) -> str:
    """Lists which servers can load an export with this ``config.json``, as measured by ``make test-served``."""
    if exported["model_type"] == "dynmoe":
        return "transformers and vLLM can load it; mlx-lm and llama.cpp cannot."
    if exported["model_type"] in ("deepseek_v3", "longcat_flash"):
        return "transformers can load it; other readers were not tried."
    gguf = "for llama.cpp use python -m dynmoe.hf gguf."
    if exported["model_type"] == "qwen2_moe" and exported["mlp_only_layers"]:
        return "transformers and vLLM can load it; mlx-lm and llama.cpp cannot, because not every layer has experts."
    if exported["model_type"] == "qwen2_moe" and exported["norm_topk_prob"]:
        return f"transformers and vLLM can load it; mlx-lm does not normalize its gates; {gguf}"
    return f"transformers, vLLM and mlx-lm can load it; {gguf}"


def _gguf(given: argparse.Namespace) -> None:
    from dynmoe.hf.gguf import write_gguf

    done = write_gguf(given.run, given.output, given.type)
    size = f"{done.parameters / 1e6:.1f} M parameters in {done.size / 1e6:.1f} MB"
    print(f"{given.output}: {size} ({given.type}), as llama.cpp's {done.architecture}, with the tokenizer.")
    _name_left_out(given.run)
    if done.composes:
        print("Give it text in NFC: training normalized text to it, and llama.cpp does not.")


def _import(given: argparse.Namespace) -> None:
    from dynmoe.hf.importing import import_checkpoint
    from dynmoe.hf.tensors import Tensors
    from dynmoe.hf.weights import prediction_tensors
    from dynmoe.train.run_directory import RunDirectory

    architecture, config = import_checkpoint(given.source, given.run, given.overrides)
    print(f"{given.run}: a {config.engine} run that starts from the weights of {given.source} ({architecture}).")
    names = prediction_tensors(architecture, Tensors(given.source).shapes(), config.model.trained_layers)
    if names:
        cure = " model.mtp.layers imports them." if architecture == "deepseek_v3" else ""
        print(f"Left out: {len(names)} tensors of layers that predict further tokens, such as {names[0]}.{cure}")
    tokenizer = RunDirectory(given.run).tokenizer
    if tokenizer.exists():
        print(f"Prepare text for it with: python -m data_prep ... --tokenizer {tokenizer}")
    else:
        print(f"{given.source} has no tokenizer; prepare text for it with the one that its weights were trained with.")
    print(f"Train it with: {config.training_command}")
