"""Pages of the documentation site that are generated when it is built (mkdocs.yml).

Home is the README and Contributing is CONTRIBUTING.md, with their links rewritten for the site. The reference comes
from the code: the configuration from ``describe_fields``, the commands from their parsers, the API from docstrings.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

import griffe

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

# Modules of each API page, by glob pattern below the repository.
API = {
    "routing": (
        "Routing",
        "Pure functions of tensors: routers, capacity, losses.",
        ["dynmoe/routing/__init__.py", "dynmoe/routing/plan.py", "dynmoe/routing/*.py"],
    ),
    "moe": (
        "MoE layer",
        "The layer, its routers, and the operators below it.",
        ["dynmoe/moe/layer.py", "dynmoe/moe/context.py", "dynmoe/moe/dispatcher.py", "dynmoe/moe/experts.py",
         "dynmoe/routers/*.py", "dynmoe/ops/routed_experts.py", "dynmoe/ops/permute.py"],
    ),
    "training": (
        "Training and models",
        "Configuration, the engine protocol, trained models, generation, and our routers in Megatron's own layer.",
        ["dynmoe/config/load.py", "dynmoe/train/engine.py", "dynmoe/trained.py", "dynmoe/generate.py",
         "dynmoe/engines/megatron/router.py"],
    ),
}  # fmt: skip
# Words that a command takes first, and that have options of their own.
VERBS_OF = {
    "data_prep.__main__": ("verify", "adopt"), "dynmoe.report": ("tokens", "budget", "dashboard"),
    "dynmoe.launch": ("slurm", "begin", "after", "address"),
}  # fmt: skip


def configuration_page() -> str:
    """Every field of the configuration by section: name, type, default, meaning."""
    from dynmoe.config import describe_fields

    sections: dict[str, list[str]] = {}
    for name, kind, default, meaning in describe_fields():
        section = name.rpartition(".")[0] or "top level"
        kinds = ", ".join(f"`{choice}`" for choice in kind.split("|"))
        escaped = meaning.replace("|", r"\|").replace("<", "&lt;").replace("*", r"\*")
        sections.setdefault(section, []).append(f"| `{name}` | {kinds} | `{default}` | {escaped} |")
    parts = ["# Configuration fields\n\nSet a field in a YAML file or as `field=value` on the command line.\n"]
    for section, rows in sections.items():
        header = [f"## {section}\n", "| Field | Type | Default | Meaning |", "|---|---|---|---|"]
        parts.append("\n".join([*header, *rows, ""]))
    return "\n".join(parts)


def commands_page() -> str:
    """The help of every command."""
    from dynmoe.__main__ import VERBS

    modules = ["data_prep.__main__", *(f"dynmoe.{verb}" for verb in VERBS)]
    parts = [
        "# Commands\n\n`torchrun train.py CONFIG key=value ...` trains a run (see the [tutorial](../tutorial.md)). "
        "`dynmoe VERB` is the same as `python -m dynmoe.VERB`.\n"
    ]
    for module in modules:
        name = module.removesuffix(".__main__")
        parts.append(f"## {name}\n")
        for words in ((), *((verb,) for verb in VERBS_OF.get(module, ()))):
            parts += [f"```text\n{text.rstrip()}\n```\n" for text in helps(module, *words)]
    return "\n".join(parts)


class _StopError(Exception):
    """Carries a parser out of the command that made it."""


def helps(module: str, *words: str) -> Iterator[str]:
    """The help of the parser that a command uses after these words, and of its sub-commands."""
    parse = argparse.ArgumentParser.parse_known_args  # the others call it

    def stop(parser: argparse.ArgumentParser, args: Sequence[str] | None = None, namespace: object = None) -> object:
        if words and args == list(words):  # the parser of the first words, which choose the next one
            return parse(parser, args, namespace)
        raise _StopError(parser)

    with (
        mock.patch.object(argparse.ArgumentParser, "parse_known_args", stop),
        mock.patch.object(sys, "argv", ["__main__.py", *words]),
    ):
        try:
            importlib.import_module(module).main()
        except _StopError as stopped:
            parser = stopped.args[0]
    with mock.patch.dict(os.environ, COLUMNS="100"):  # not the width of somebody's terminal
        yield parser.format_help()
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                yield from [verb.format_help() for verb in dict.fromkeys(action.choices.values())]


def api_page(title: str, summary: str, patterns: list[str]) -> str:
    """Directives for the public members of modules; mkdocstrings reads their docstrings."""
    parts = [f"# {title}\n\n{summary}\n"]
    for path in dict.fromkeys(found for pattern in patterns for found in sorted(ROOT.glob(pattern))):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        # A package re-exports what its modules show.
        options = "    options:\n      members: false\n" if path.name == "__init__.py" else ""
        parts.append(f"## {module}\n\n::: {module}\n{options}")
    return "\n".join(parts)


def root_page(name: str) -> str:
    """A page from the root of the repository, with links as they are in the site."""
    text = (ROOT / name).read_text()
    text = re.sub(r"(?<=\]\()docs/", "", text)
    return text.replace("](CONTRIBUTING.md", "](contributing.md").replace("](README.md", "](index.md")


def pages() -> dict[str, str]:
    """Every generated page by its path in the site."""
    api = {f"reference/{name}.md": api_page(*parts) for name, parts in API.items()}
    return {
        "index.md": root_page("README.md"),
        "contributing.md": root_page("CONTRIBUTING.md"),
        "reference/configuration.md": configuration_page(),
        "reference/commands.md": commands_page(),
        **api,
    }


def on_files(files, config):
    """MkDocs event: adds the generated pages."""
    from mkdocs.structure.files import File

    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """MkDocs event: links to the root of the repository, as GitHub needs them, become links in the site."""
    return markdown.replace("](../README.md", "](index.md").replace("](../CONTRIBUTING.md", "](contributing.md")


class PlainRoles(griffe.Extension):
    """Turns Sphinx roles in docstrings (:func:`name`) into code."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring:
            obj.docstring.value = re.sub(r":(?:func|class|meth|mod|attr):(?=`)", "", obj.docstring.value)
