"""Snippets of README and docs, and what a command, a field, a file or a method in them must be to be true."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from torch.distributed.run import get_args_parser

from dynmoe.__main__ import VERBS
from dynmoe.config import Config, describe_fields, load_config
from dynmoe.plan.speed import Hardware
from harness.processes import ROOT

# The log is left out: it is history, and what it names was there then.
_DOCS = [path for path in sorted((ROOT / "docs").glob("*.md")) if path.name != "log.md"]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *_DOCS]
# What a reader puts in the place of words.
_PLACEHOLDERS = {
    "CONFIG": "configs/one_node.yaml", "N": "2", "G": "8", "K": "2", "key=value": "train.steps=10", "...": "",
    "data_prep ...": "data_prep my_texts --out data/mine", "bench NAME": "bench layer", "$SLURM_NNODES": "2",
    "$SLURM_NODEID": "1",
}  # fmt: skip
# Programs of others, whose arguments are theirs to check.
_OTHERS = (
    "source", "printf", "srun", "ssh", "scontrol", "apt-get", "wandb", "tensorboard", "lm_eval", "scancel",
    "vllm", "curl",
    ".venv/bin/pre-commit",
)  # fmt: skip
_OURS = ("python", ".venv/bin/python", "torchrun", "train.py", "dynmoe", "make", "pip", "pytest", "sbatch")
_FIELDS = {name: kind for name, kind, *_ in describe_fields()}
_SECTIONS = {name.rsplit(".", depth)[0] for name in _FIELDS for depth in range(1, name.count(".") + 1)}
# Look like fields, but are arguments of transformers.
_ARGUMENTS = {"output_router_logits", "add_bos_token", "prefix_token_id", "add_special_tokens"}
# Options of lm-evaluation-harness, DeepSpeed's launcher, Megatron-LM and vLLM that the pages name.
_OPTIONS_OF_OTHERS = {
    "--include", "--exclude", "--spec", "--moe-token-dispatcher-type", "--data-path", "--trust-remote-code",
    "--model-impl",
}  # fmt: skip
# Files that a run or an export has.
_MADE = {"config.yaml", "model.safetensors", "routing_dynmoe.py"}


@dataclass(frozen=True)
class Snippet:
    """A block of a page, or code within its text; ``language`` is what a fence says."""

    page: str
    line: int
    text: str
    language: str = ""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks() -> list[Snippet]:
    """Every fenced or indented block."""
    return [
        Snippet(page, token.map[0] + 1, token.content.rstrip("\n"), token.info.strip())
        for page, token in _tokens()
        if token.type in ("fence", "code_block")
    ]


def inline_code() -> list[Snippet]:
    """All code within text, on one line."""
    return [
        Snippet(page, token.map[0] + 1, " ".join(child.content.split()))
        for page, token in _tokens()
        for child in token.children or ()
        if child.type == "code_inline"
    ]


def _tokens() -> Iterator:
    for path in PAGES:
        for token in MarkdownIt().enable("table").parse(path.read_text()):
            yield str(path.relative_to(ROOT)), token


def commands(text: str) -> list[list[str]]:
    """The words of each command; optional parts are taken, placeholders replaced, redirections left out."""
    text = re.sub(r"(?<=\s)\[([^]]+)\]", r"\1", text.replace("\\\n", " "))
    for placeholder, value in reversed(_PLACEHOLDERS.items()):
        text = re.sub(rf"(?<!\S){re.escape(placeholder)}(?=[\s']|$)", value, text)
    found = []
    for line in text.splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&>")
        lexer.whitespace_split = True
        found.append([])
        for word in lexer:
            if word == "&&":
                found.append([])
            elif word == ">":
                break
            else:
                found[-1].append(word)
    return [words for words in found if words]


class _ParsedError(Exception):
    """Carries what a tool read from its command line: it goes no further."""


class Shell:
    """Checks commands by the parsers of the tools that they call; plans and job scripts are made.

    ``folder``, where they are called, is given what a reader has there.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for path in _files():
            if not (place := folder / Path(path).parts[0]).exists():
                place.symlink_to(ROOT / Path(path).parts[0])
        (folder / "my.yaml").write_text("{}\n")
        self._patch = monkeypatch
        self._patch.chdir(folder)

    def check(self, text: str) -> None:
        """Raises whatever is wrong with a command."""
        for words in commands(text):
            while re.match(r"[A-Z_]+=", words[0]):
                variable = words.pop(0).split("=")[0]
                scripts = [_text(path) for path in _files() if path.startswith("launch/")]
                assert any(re.search(rf"\b{variable}\b", script) for script in scripts), f"no script reads {variable}"
            try:
                self._check_command(*words)
            except SystemExit as ended:
                if ended.code:  # --help ends with 0
                    raise AssertionError(f"{' '.join(words)}: refused by its parser") from None

    def _check_command(self, program: str, *words: str) -> None:
        if program in _OTHERS:
            for inner in [word for word in words if word.startswith("python ")]:  # bash -c '...'
                self.check(inner)
        elif program == "pip":
            self._pip(words)
        elif program == "make":
            rules = re.findall(r"^([\w-]+)(?::| \?=)", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert not {word.split("=")[0] for word in words} - set(rules), f"make {' '.join(words)}: no such target"
        elif program == "torchrun":
            self._torchrun(words)
        elif program.endswith("python") and words[0] == "-m":
            self._call(words[1], words[2:])
        elif program.endswith("python"):
            self._check_command(*words)
        elif program == "dynmoe":
            self._call(f"dynmoe.{words[0]}", words[1:])
        elif program == "pytest":
            self._check_tests(words)
        elif program == "train.py":
            self._train(words)
        elif program == "sbatch" or program.startswith(("launch/", "bench/")):
            self._launch([program, *words])
        else:
            self._example(program, words)

    def _pip(self, words: Sequence[str]) -> None:
        """Our extras; or packages without what they require, as a script of ours has them."""
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        known = {"-e", *(f"{project}[{extra}]" for project in (".", "dynmoe") for extra in extras)}
        if words[1] == "--no-deps":
            known = {"--no-deps", *re.findall(r"[\w-]+==[\w.]+", _text("bench/gpu_day.sh"))}
        assert words[0] == "install"
        assert not set(words[1:]) - known, f"pip {' '.join(words)}: no such part"

    def _torchrun(self, words: Sequence[str]) -> None:
        given = get_args_parser().parse_args(words)
        if given.training_script.startswith("examples/"):
            self._example(given.training_script, given.training_script_args)
            return
        assert given.training_script == "train.py"
        self._train(given.training_script_args).check_world(int(given.nproc_per_node))

    def _example(self, program: str, words: Sequence[str]) -> None:
        """An example, and the names of its options."""
        assert program.startswith("examples/"), f"{program}: nothing is known of it"
        known = re.findall(r'"(--[\w-]+)"', Path(program).read_text())
        unknown = {word for word in words if word.startswith("-")} - set(known)
        assert not unknown, f"{program}: no such options: {unknown}"

    def _train(self, words: Sequence[str]) -> Config:
        """The configuration that train.py makes of its arguments."""
        import train

        self._patch.setattr(sys, "argv", ["train.py", *words])
        config = train.parse_arguments()[0]
        own = config.run.name != "default" or "configs/quickstart.yaml" not in words or "--print-config" in words
        assert own, "the name of another command's run would make this one continue it: set run.name"
        return config

    def _launch(self, words: list[str]) -> None:
        """A script of ours, or a job, after options of sbatch; what follows it is a configuration."""
        if words[0] == "bench/gpu_day.sh":
            self._gpu_day(*words[1:])
            return
        while not re.match(r"launch/|\w+\.sbatch$", words[0]):
            words.pop(0)
        assert Path(words[0]).is_file(), f"{words[0]} is not there"
        if arguments := [word for word in words[1:] if word != "hostfile"]:
            self._train(arguments)

    def _gpu_day(self, verb: str, *words: str) -> None:
        """``pack``, or ``run`` with a directory and arguments of the benchmark."""
        assert f"\n{verb}() {{" in _text("bench/gpu_day.sh"), f"bench/gpu_day.sh {verb}: no such verb"
        if verb == "run":
            self._call("bench", ["gpu_day", *words[1:]])

    def _call(self, module: str, words: Sequence[str]) -> None:
        """``python -m``: what is said without arguments is a name, which must be there."""
        if module == "pytest":
            self._check_tests(words)
            return
        if (verb := module.removeprefix("dynmoe.")) != module:
            assert verb in VERBS, f"{module}: no such tool"
        tool = importlib.import_module(module if "." in module else f"{module}.__main__")
        if not words:
            assert callable(tool.main)
            return
        self._patch.setattr(sys, "argv", [module, *words])
        if (module == "dynmoe.plan" and "--dry-start" not in words) or words[0] == "slurm":
            tool.main()
            return
        given = self._parsed(tool)
        if hasattr(given, "overrides"):
            config = load_config(getattr(given, "config", None), given.overrides)
            if module == "dynmoe.hf":  # a later command trains this run
                given.run.mkdir(parents=True)
                (given.run / "config.yaml").write_text(config.to_yaml())

    def _check_tests(self, words: Sequence[str]) -> None:
        """Files, the name of a test after -k, and marks of pyproject.toml after -m."""
        paths, names = ([word for word in words if ("/" in word) == is_path] for is_path in (True, False))
        tests = "".join(_text(path) for path in _files() if path.endswith(".py") and "/test_" in path)
        assert all((ROOT / path).is_file() for path in paths)
        if "-m" in names:
            marks = re.sub(r"\b(not|and|or)\b", "", names.pop(names.index("-m") + 1)).split()
            assert all(f'"{mark}: ' in _text("pyproject.toml") for mark in marks)
        assert all(name in ("-k", "-m") or name in tests for name in names)

    def _parsed(self, tool: object) -> argparse.Namespace:
        """What a tool reads from its command line."""
        with pytest.MonkeyPatch.context() as patch:
            for name in ("parse_args", "parse_intermixed_args"):
                parse = getattr(argparse.ArgumentParser, name)

                def stop(parser, arguments=None, namespace=None, parse=parse):
                    given = parse(parser, arguments, namespace)
                    if set(vars(given)) == {"verb"}:  # whose own parser comes next
                        return given
                    raise _ParsedError(given)

                patch.setattr(argparse.ArgumentParser, name, stop)
            with pytest.raises(_ParsedError) as parsed:
                tool.main()
        return parsed.value.args[0]


def check_block(shell: Shell, snippet: Snippet) -> None:
    """Raises whatever is wrong with a configuration, with JSON, or with commands."""
    if snippet.language == "yaml":
        Path("snippet.yaml").write_text(snippet.text)
        load_config("snippet.yaml")
    elif snippet.language == "json":
        json.loads(snippet.text)
    else:
        shell.check(snippet.text)


def check_inline(shell: Shell, text: str) -> bool:
    """Checks a command, fields, a file or a method; False for what is none of them."""
    words = text.split()
    if len(words) > 1 and re.match(rf"([A-Z_]+=\S+ )*({'|'.join(map(re.escape, _OURS))}|launch/\S+) ", text):
        shell.check(text)
    elif all(re.fullmatch(r"[a-z_.]+=\S+", word) for word in words):
        for word in words:
            _check_field(*word.split("=", 1))
    elif re.fullmatch(r"[\w./-]+\.(py|sh|sbatch|md|yaml|safetensors)", text):
        known = [f"/{path}" for path in _files()]
        assert text in _MADE or any(path.endswith(f"/{text}") for path in known), f"{text} is not there"
    elif re.fullmatch(r"[a-z_]+(\.[a-z_]+)+", text) and text[: text.index(".")] in _SECTIONS:
        assert text in _FIELDS or text in _SECTIONS, f"{text}: no such field"
    elif text.startswith("--"):
        _check_option(words[0])
    elif found := re.fullmatch(r"(?:train|eval|moe|memory)/(?:layer_II/)?([a-z0-9_]+)", text):
        sources = [_text(path) for path in _files() if path.startswith("dynmoe/") and path.endswith(".py")]
        assert any(f'"{text}"' in source or f'"{found[1]}"' in source for source in sources), f"{text}: no such figure"
    elif found := re.fullmatch(r"([A-Z][A-Za-z]+)\.(\w+)", text):
        owners = [path for path in _files() if path.endswith(".py") and f"\nclass {found[1]}" in _text(path)]
        assert any(f"def {found[2]}(" in _text(path) for path in owners), f"{text}: no such method"
    else:
        return False
    return True


def _check_option(option: str) -> None:
    """One of a tool of ours, or of torchrun."""
    hardware = {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(Hardware)}
    torchrun = {own for action in get_args_parser()._actions for own in action.option_strings}
    known = any(f'"{option}"' in _text(path) for path in _files() if path.endswith(".py") and "tests/" not in path)
    assert known or option in hardware | torchrun | _OPTIONS_OF_OTHERS, f"{option}: no such option"


def _check_field(name: str, value: str) -> None:
    """``name`` may leave out the sections, as a paragraph about them does."""
    kinds = [set(kind.split("|")) for field, kind in _FIELDS.items() if f".{field}".endswith(f".{name}")]
    assert kinds or name in _ARGUMENTS, f"{name}: no such field"
    free = name in _ARGUMENTS or any(own & {"int", "float", "str", "bool"} or len(own) == 1 for own in kinds)
    assert free or any(value in own for own in kinds), f"{name}={value}: no such choice"


@functools.cache
def _text(path: str) -> str:
    return (ROOT / path).read_text()


@functools.cache
def _files() -> list[str]:
    """Files of the project: all that git does not ignore."""
    return subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True).splitlines()
