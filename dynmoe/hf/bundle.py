"""The modeling code that ships with the weights: our own files, rewritten to import nothing from the project."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

from dynmoe.errors import UserError
from dynmoe.routers import ROUTERS

_HERE = Path(__file__).parent
_MODULES = ("configuration_dynmoe", "serving_dynmoe", "attention_dynmoe", "moe_dynmoe", "modeling_dynmoe")
_FUTURE = "from __future__ import annotations"
_HEADS = {"routing": "Routing formulas", "ops": "Routed experts", "routers": "Routers"}
_Import = ast.Import | ast.ImportFrom


def write_code(directory: Path) -> None:
    """Writes the files that ``auto_map`` names, and the files that they import.

    Raises:
        UserError: a router imports what an export cannot contain, or two of its modules define one name.
    """
    modules = _exported_modules()
    for bundle in _HEADS:
        own = [name for name in modules if _bundle_of(name) == bundle]
        (directory / f"{bundle}_dynmoe.py").write_text(_bundle(bundle, own, set(modules)))
    for name in _MODULES:
        text = (_HERE / f"{name}.py").read_text()
        text = re.sub(r"from dynmoe\.hf\.(\w+) import", r"from .\1 import", text)
        text = re.sub(r"from (dynmoe[.\w]+) import", lambda found: f"from .{_bundle_of(found[1])}_dynmoe import", text)
        (directory / f"{name}.py").write_text(text)


def _bundle_of(module: str) -> str:
    """The combined file that a module becomes part of."""
    package = ".".join(module.split(".")[:2])
    return {"dynmoe.routing": "routing", "dynmoe.ops": "ops"}.get(package, "routers")


def _exported_modules() -> list[str]:
    """The modules that all routers and the modeling code need, each after those that it imports."""
    losses = {
        field.metadata["loss"].__module__
        for router in ROUTERS.values()
        for field in router.__dataclass_fields__.values()
        if "loss" in field.metadata
    }
    modeling = [f"dynmoe.hf.{name}" for name in _MODULES]
    waiting = [*modeling, *sorted(losses), *(router.__module__ for router in ROUTERS.values())]
    routers = set(waiting)
    graph: dict[str, list[str]] = {}
    while waiting:
        name = waiting.pop()
        if name not in graph:
            found = [module for node in _imports(_source(name), typing=False) for module in _imported(node)]
            graph[name] = sorted({module for module in found if module.startswith("dynmoe.") or module in routers})
            waiting += graph[name]
    exportable = ("dynmoe.errors", "dynmoe.fields", "dynmoe.routers.", "dynmoe.routing.", "dynmoe.ops.", *routers)
    for name, imports in graph.items():
        for module in imports:
            if not module.startswith(exportable):
                cure = "import it from dynmoe.routing, dynmoe.ops or dynmoe.routers, or write it into the router's file"
                raise UserError(f"{name} imports {module}, which an export cannot contain; {cure}")
    return [name for name in TopologicalSorter(graph).static_order() if name not in modeling]


def _source(name: str) -> str:
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).read_text()


# Once for each text: a process may export many models.
@cache
def _parse(text: str) -> ast.Module:
    return ast.parse(text)


def _is_for_typing(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


@cache
def _imports(text: str, typing: bool = True) -> tuple[_Import, ...]:
    """All import statements, those in functions included; without those for type checkers if not ``typing``."""
    return tuple(_imports_below(_parse(text), typing))


def _imports_below(tree: ast.AST, typing: bool) -> Iterator[_Import]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, _Import):
            yield node
        elif typing or not _is_for_typing(node):
            yield from _imports_below(node, typing)


def _imported(node: _Import) -> list[str]:
    """The modules that the imported names come from, seen through packages that pass them on."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    module = node.module or ""
    if not module.startswith("dynmoe."):
        return [module]
    spec = importlib.util.find_spec(module)
    if spec is None or spec.submodule_search_locations is None:
        return [module]
    package = importlib.import_module(module)
    return [getattr(getattr(package, alias.name), "__module__", module) for alias in node.names]


def _bundle(bundle: str, modules: list[str], exported: set[str]) -> str:
    """The source of several modules in one file, with all imports at its top."""
    imports: dict[str, set[str]] = {}
    bodies = []
    defined: dict[str, str] = {}
    for name in modules:
        text = _source(name)
        tree = _parse(text)
        for own in _defined(tree):
            if own in defined:
                problem = f"{name} and {defined[own]} both define {own}, and an export has them in one file"
                raise UserError(f"{problem}; rename one of them")
            defined[own] = name
        for node in _imports(text):
            for source, names in _exported_import(node, bundle, exported):
                imports.setdefault(source, set()).add(names)
        heading = ast.get_docstring(tree, clean=False) or ""  # becomes a comment
        comment = "\n".join(f"# {line}".rstrip() for line in [f"--- {name.rpartition('.')[2]}", *heading.splitlines()])
        bodies.append(f"{comment}\n\n\n{_without_imports(text, tree)}")
    head = f'"""{_HEADS[bundle]} of DynMoE at the time of this export. Generated by dynmoe.hf."""'
    del imports["from __future__"]
    lines = sorted(imports.pop("import", set()))
    lines += [f"{source} import {', '.join(sorted(names))}" for source, names in sorted(imports.items())]
    return "\n".join([head, "", _FUTURE, "", *lines, "", "", "\n\n\n".join(bodies), ""])


def _defined(tree: ast.Module) -> set[str]:
    """Names that a module defines itself."""
    names = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def _without_imports(text: str, tree: ast.Module) -> str:
    """The text of a module without its docstring and imports, also those in functions and for type checkers."""
    lines = text.splitlines()
    blocks: list[ast.stmt] = [node for node in tree.body if _is_for_typing(node)]
    docstring = tree.body[:1] if ast.get_docstring(tree) is not None else []
    removed: set[int] = set()
    for node in [*docstring, *blocks, *_imports(text)]:
        assert node.end_lineno is not None
        # An import in a function is followed by a blank line.
        blank = node.col_offset > 0 and node.end_lineno < len(lines) and not lines[node.end_lineno].strip()
        removed |= set(range(node.lineno - 1, node.end_lineno + blank))
    return "\n".join(line for number, line in enumerate(lines) if number not in removed).strip()


def _exported_import(node: _Import, bundle: str, exported: set[str]) -> Iterator[tuple[str, str]]:
    """Pairs such as ``("from math", "log")`` to import in the exported file, or ``("import", "import math")``.

    Names of the same file need no import, nor do those of the project that serve type checkers only.
    """
    if isinstance(node, ast.Import):
        yield "import", ast.unparse(node)
        return
    modules = _imported(node)
    for alias, module in zip(node.names, modules if len(modules) > 1 else modules * len(node.names), strict=True):
        if module in exported and _bundle_of(module) != bundle:
            yield f"from .{_bundle_of(module)}_dynmoe", ast.unparse(alias)
        elif module not in exported and not module.startswith("dynmoe.") and alias.name != "TYPE_CHECKING":
            yield f"from {module}", ast.unparse(alias)
