"""Fuzzing for F25: a file or a command line is read as intended, or refused in one line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dynmoe.config import Config, describe_fields, load_config
from dynmoe.errors import UserError
from dynmoe.routers import ROUTERS
from tests.faults.hostile import attempt, damaged, fuzz

ROOT = Path(__file__).parents[2]
SECRET = "known to the environment alone"
KINDS = {name: (kind, default == "null") for name, kind, default, _ in describe_fields()}
NULLS = ("", "~", "null", "Null", "NULL")
TRUE = ("true", "yes", "on", "1")
FALSE = ("false", "no", "off", "0")
FORMER = {"data.verify": dict.fromkeys(TRUE, "once") | dict.fromkeys(FALSE, "never")}  # what older runs wrote
# Values that users and attackers write into configurations.
WORDS = (
    "nan", ".nan", "inf", "-.inf", "1e400", "9" * 400, "-1", "0", "1.5", "010", "0x10", "1:30", "1_0", "+3", "true",
    "off", "null", "~", "''", "???", "${oc.env:DYNMOE_MARKER}", "${run.dir}", "'../x'", '"a\\nb"', '"\\0"', '"\\ud800"',
    "[]", "{}", "[1]", "[[1]]", "[null]", "{a: 1}", "[{a: 1}]", "!!python/object/apply:os.system [touch executed]",
    "!!int 3", "&a 1", "*a", "<<", "2024-01-01", "a b", "a #b", "é", "|", "- 1", "%", "@", "top_any", "2",
)  # fmt: skip
YAML_WORDS = tuple(
    word.encode() for word in (
        *WORDS, "*a", "&a ", "<<: ", "!!binary ", "[", "{", "]", "}", ",", "- ", "? ", ": ", "\t", "\n", "\n---\n",
        "\n...\n", "%YAML 1.1\n", "\u2028", "\x85", "\r", "\ufeff", "|\n ", ">-\n ", "#", "'", '"', "\\", "model.",
    )
)  # fmt: skip


def meaning(name: str, text: Any) -> Any:
    """The value that a field takes from text.

    Raises:
        ValueError: the text must be refused.
    """
    kind, optional = KINDS[name]
    if text is None:
        if optional:
            return None
        raise ValueError(f"{name} is never null")
    if kind.startswith("[") != isinstance(text, list):
        raise ValueError(f"{name}: {text!r} is no {kind}")
    if isinstance(text, list):
        return [scalar(kind.strip("[]"), item) for item in text]
    value = scalar(kind.removesuffix("|null"), text)
    return FORMER[name].get(text.lower(), value) if name in FORMER else value


def scalar(kind: str, text: Any) -> Any:
    if not isinstance(text, str) or (kind == "bool" and text.lower() not in TRUE + FALSE):
        raise ValueError(f"{text!r} is no {kind}")
    if kind == "bool":
        return text.lower() in TRUE
    return {"int": int, "float": float}.get(kind, str)(text)


@st.composite
def values(draw: st.DrawFn, name: str) -> tuple[str, Any]:
    """A value in YAML, and its text (a list of texts, or None), or ... if the result is not predicted."""
    kind = KINDS[name][0]
    if draw(st.integers(0, 4)) == 0:
        return draw(st.sampled_from(WORDS)), ...
    usual = {"int": ("1", "2", "4", "8", "64"), "float": ("0.5", "1", "1e-3", "2.5"), "bool": TRUE + FALSE}
    any_ = {"int": st.integers(-1, 64).map(str), "float": st.floats(width=32).map(str)}
    base = kind.removesuffix("|null").strip("[]")
    own = st.sampled_from(usual.get(base, ("a.b", "1.10") if base == "str" else base.split("|")))
    own |= own | any_.get(base, st.text(max_size=6))
    if kind.startswith("["):
        spelled = [_spelled(draw, text) for text in draw(st.lists(own, max_size=3))]
        return f"[{', '.join(spelling for spelling, _ in spelled)}]", [text for _, text in spelled]
    return _spelled(draw, draw(own))


def _spelled(draw: st.DrawFn, text: str) -> tuple[str, str | None]:
    if re.fullmatch(r"-?[A-Za-z0-9_.+/][A-Za-z0-9_.+/-]*", text) and draw(st.booleans()):
        return text, None if text in NULLS else text
    if text.isprintable() and draw(st.booleans()):
        return "'" + text.replace("'", "''") + "'", text
    return json.dumps(text, ensure_ascii=max(text, default="") < "\U00010000"), text


@st.composite
def fields(draw: st.DrawFn) -> dict[str, tuple[str, Any]]:
    """One or two fields with their values."""
    names = draw(st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=2, unique=True))
    return {name: draw(values(name)) for name in names}


def check_values(config: Config, given: dict[str, tuple[str, Any]]) -> None:
    for name, (_, text) in given.items():
        router = config.model.router
        field = name.rpartition(".")[2]
        if name.startswith("model.router.") and not router.has_field(field):
            defaults = [own.__dataclass_fields__[field].default for own in ROUTERS.values() if own.has_field(field)]
            assert text is ... or field in ("k", "p") or meaning(name, text) in (0, *defaults), name
        elif text is not ...:
            value = attrgetter(name)(config)
            expected = meaning(name, text)
            assert (value, type(value)) == (expected, type(expected)), name


def check_round_trip(config: Config, path: Path) -> None:
    content = config.to_yaml()
    assert SECRET not in content
    path.write_text(content)
    assert load_config(path) == config


@fuzz(75)
@given(given_fields=fields())
def test_f25_fuzz_overrides(tmp_path, monkeypatch, given_fields):
    monkeypatch.setenv("DYNMOE_MARKER", SECRET)
    overrides = [f"{name}={spelling}" for name, (spelling, _) in given_fields.items()]
    config = attempt(lambda: load_config(None, overrides))
    if config is not None:
        check_values(config, given_fields)
        check_round_trip(config, tmp_path / "again.yaml")


ODD = st.builds(
    "{}{}={}{}".format, st.sampled_from(sorted(KINDS)), st.text(max_size=2), st.text(max_size=3), st.sampled_from(WORDS)
)


@fuzz(100)
@given(overrides=st.lists(st.text() | ODD, min_size=1, max_size=3))
def test_f25_fuzz_overrides_of_anything(tmp_path, monkeypatch, overrides):
    monkeypatch.setenv("DYNMOE_MARKER", SECRET)
    config = attempt(lambda: load_config(None, overrides))
    if config is not None:
        check_round_trip(config, tmp_path / "again.yaml")


def block(tree: dict[str, Any], indent: str = "") -> str:
    """A mapping in YAML block style."""
    return "".join(
        f"{indent}{key}:\n{block(value, indent + ' ')}" if isinstance(value, dict) else f"{indent}{key}: {value}\n"
        for key, value in tree.items()
    )


def flow(tree: dict[str, Any]) -> str:
    """A mapping in YAML flow style."""
    return "{" + ", ".join(f"{key}: {flow(v) if isinstance(v, dict) else v}" for key, v in tree.items()) + "}"


@fuzz(75)
@given(given_fields=fields(), write=st.sampled_from((block, flow)))
def test_f25_fuzz_configuration_files(tmp_path, monkeypatch, given_fields, write):
    monkeypatch.setenv("DYNMOE_MARKER", SECRET)
    tree: dict[str, Any] = {}
    for name, (spelling, _) in given_fields.items():
        *sections, field = name.split(".")
        section = tree
        for own in sections:
            section = section.setdefault(own, {})
        section[field] = spelling
    (tmp_path / "run.yaml").write_text(write(tree), encoding="utf-8", errors="replace", newline="")
    config = attempt(lambda: load_config(tmp_path / "run.yaml"))
    if config is not None:
        check_values(config, given_fields)
        check_round_trip(config, tmp_path / "again.yaml")


VALID_FILES = [path.read_bytes() for path in sorted((ROOT / "configs").glob("*.yaml"))]


@fuzz(100)
@given(content=st.sampled_from(VALID_FILES).flatmap(lambda valid: damaged(valid, YAML_WORDS)) | st.binary(max_size=40))
def test_f25_fuzz_corrupt_configuration_files(tmp_path, monkeypatch, content):
    """Accepted values are those that an untyped YAML parser reads."""
    monkeypatch.setenv("DYNMOE_MARKER", SECRET)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_bytes(content)
    config = attempt(lambda: load_config(tmp_path / "run.yaml"))
    assert not (tmp_path / "executed").exists()
    if config is not None:
        check_round_trip(config, tmp_path / "again.yaml")
        for name, text in leaves(yaml.load(content, yaml.BaseLoader)):
            if name.startswith("model.router.") and not config.model.router.has_field(name.rpartition(".")[2]):
                continue  # a default of another router
            value = attrgetter(name)(config)
            assert value == (None if value is None and text in NULLS else meaning(name, text)), name


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if prefix in KINDS:
        yield prefix, tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves(value, f"{prefix}.{key}" if prefix else key)
    else:
        assert prefix == ""
        assert tree is None or tree in NULLS  # an empty file, or one that says nothing


def test_f25_fuzz_properties_detect_a_wrong_loader(tmp_path):
    """The checks above detect wrong values."""
    config = load_config(None, ["run.name=1.1"])
    with pytest.raises(AssertionError):
        check_values(config, {"run.name": ("1.10", "1.10")})
    with pytest.raises(ValueError, match="is no int"):
        check_values(config, {"train.steps": ("x", ["x"])})
    with pytest.raises(AssertionError):
        attempt(lambda: (_ for _ in ()).throw(UserError("two\nlines")))
