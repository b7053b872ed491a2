"""Signatures of a package, parsed from its files; neither the package nor its Python version is needed."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


class Sources:
    """The files of a package below ``root``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._read: dict[str, dict[str, ast.AST | str]] = {}

    def _path(self, module: str) -> Path | None:
        below = self.root.joinpath(*module.split("."))
        return next((path for path in (below.with_suffix(".py"), below / "__init__.py") if path.is_file()), None)

    def _names(self, module: str) -> dict[str, ast.AST | str]:
        """Top-level names of a module, each with its definition or the origin of its import (``module:name``)."""
        if module not in self._read:
            path = self._path(module)
            self._read[module] = {} if path is None else self._bound(module, path)
        return self._read[module]

    def _bound(self, module: str, path: Path) -> dict[str, ast.AST | str]:
        names: dict[str, ast.AST | str] = {}
        for node in _top_level(ast.parse(path.read_text())):
            if isinstance(node, Definition):
                names[node.name] = node
            elif isinstance(node, ast.ImportFrom):
                source = self._absolute(module, path, node)
                names |= {alias.asname or alias.name: f"{source}:{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                # A name that is None only where an optional package is missing counts as a function.
                names = {target.id: node for target in targets if isinstance(target, ast.Name)} | names
        return names

    @staticmethod
    def _absolute(module: str, path: Path, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
        base = package[: len(package) - node.level + 1]
        return ".".join([*base, *([node.module] if node.module else [])])

    def find(self, module: str, name: str) -> tuple[str, ast.AST] | None:
        """The module that defines ``name``, as imported in ``module``, and its definition; None if there is none."""
        if self._path(f"{module}.{name}") is not None:
            return f"{module}.{name}", ast.Module([], [])
        found = self._names(module).get(name)
        if isinstance(found, str):
            source, _, original = found.partition(":")
            return self.find(source, original) if source.startswith("megatron.") else (source, ast.Module([], []))
        return None if found is None else (module, found)

    def parameters(self, module: str, definition: Definition) -> list[str] | None:
        """Parameter names; None if a call may pass any."""
        if isinstance(definition, ast.ClassDef):
            return self._of_class(module, definition)
        arguments = definition.args
        names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
        return None if arguments.kwarg else names

    def _of_class(self, module: str, definition: ast.ClassDef) -> list[str] | None:
        for own in definition.body:
            if isinstance(own, ast.FunctionDef) and own.name == "__init__":
                return self.parameters(module, own)
        names = [own.target.id for own in definition.body if isinstance(own, ast.AnnAssign)]  # type: ignore[union-attr]
        for base in definition.bases:
            found = self.find(module, base.id) if isinstance(base, ast.Name) else None
            if found and isinstance(found[1], ast.ClassDef):
                inherited = self._of_class(found[0], found[1])
                if inherited is None:
                    return None
                names += inherited
        return names

    def method(self, module: str, definition: ast.ClassDef, name: str) -> tuple[str, ast.FunctionDef] | None:
        """The method of a class or its bases, with the module that defines it."""
        for own in definition.body:
            if isinstance(own, ast.FunctionDef) and own.name == name:
                return module, own
        for base in definition.bases:
            found = self.find(module, base.id) if isinstance(base, ast.Name) else None
            if found and isinstance(found[1], ast.ClassDef) and (there := self.method(found[0], found[1], name)):
                return there
        return None


def _top_level(tree: ast.Module) -> Iterator[ast.stmt]:
    """Statements of a module, including those in ``if`` and ``try``."""
    waiting: list[ast.stmt] = list(tree.body)
    while waiting:
        node = waiting.pop(0)
        yield node
        for field in ("body", "orelse", "finalbody") if isinstance(node, ast.If | ast.Try) else ():
            waiting += getattr(node, field, [])
        if isinstance(node, ast.Try):
            waiting += [own for handler in node.handlers for own in handler.body]


def problems(sources: Sources, code: Path) -> list[str]:
    """Imports of a file that the package lacks, and keyword arguments that it does not accept."""
    tree = ast.parse(code.read_text())
    bound: dict[str, tuple[str, ast.AST]] = {}
    said = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron."):
            for alias in node.names:
                found = sources.find(node.module or "", alias.name)
                if found is None:
                    said.append(f"{code.name}: {node.module} has no {alias.name}")
                else:
                    bound[alias.asname or alias.name] = found
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (called := _called(sources, bound, node.func)):
            module, definition, name = called
            taken = sources.parameters(module, definition)
            surplus = [word.arg for word in node.keywords if word.arg and taken is not None and word.arg not in taken]
            said += [f"{code.name}: {name} takes no {word}" for word in surplus]
    return said


def _called(
    sources: Sources, bound: dict[str, tuple[str, ast.AST]], called: ast.expr
) -> tuple[str, Definition, str] | None:
    """Module, definition and name of a called object, if the package defines it."""
    if isinstance(called, ast.Name) and called.id in bound:
        module, definition = bound[called.id]
        return (module, definition, called.id) if isinstance(definition, Definition) else None
    if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name) and called.value.id in bound:
        module, definition = bound[called.value.id]
        name = f"{called.value.id}.{called.attr}"
        if isinstance(definition, ast.ClassDef):
            found = sources.method(module, definition, called.attr)
            return (*found, name) if found else None
        there = sources.find(module, called.attr)
        return (*there, name) if there and isinstance(there[1], Definition) else None  # type: ignore[return-value]
    return None
