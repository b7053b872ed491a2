"""The modeling code that travels with the weights: our own files, with nothing of the project left to import."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

from dynmoe.routers import ROUTERS

_HERE = Path(__file__).parent
_MODULES = ("configuration_dynmoe", "serving_dynmoe", "attention_dynmoe", "moe_dynmoe", "modeling_dynmoe")
_FUTURE = "from __future__ import annotations"
_HEADS = {"routing": "Routing formulas", "ops": "Routed experts", "routers": "Routers"}
_FORMULAS = (
    "plan", "selection", "control", "top_k", "top_p", "top_any", "sigmoid", "relu", "null_experts", "expert_threshold",
    "losses",
)  # fmt: skip


def write_code(directory: Path) -> None:
    """Writes the files that ``auto_map`` names, and those that they import."""
    bundles = _bundles()
    for bundle, modules in bundles.items():
        (directory / f"{bundle}_dynmoe.py").write_text(_bundle(bundle, modules, bundles))
    for name in _MODULES:
        text = (_HERE / f"{name}.py").read_text()
        text = re.sub(r"from dynmoe\.hf\.(\w+) import", r"from .\1 import", text)
        text = re.sub(
            r"from (dynmoe[.\w]+) import", lambda found: f"from .{_home(found[1], bundles)}_dynmoe import", text
        )
        (directory / f"{name}.py").write_text(text)


def _bundles() -> dict[str, list[str]]:
    """The modules that become one file, in the order in which they need each other."""
    losses = [
        field.metadata["loss"].__module__
        for router in ROUTERS.values()
        for field in router.__dataclass_fields__.values()
        if "loss" in field.metadata
    ]
    own = [router.__module__ for router in ROUTERS.values()]
    base = ["dynmoe.errors", "dynmoe.fields", "dynmoe.routers.base"]
    routers = dict.fromkeys([*base, *(name for name in losses if name not in own), "dynmoe.routers.parts", *own])
    return {
        "routing": [f"dynmoe.routing.{name}" for name in _FORMULAS],
        "ops": [f"dynmoe.ops.{name}" for name in ("permute", "swiglu", "backends", "opaque")],
        "routers": list(routers),
    }


def _home(module: str, bundles: dict[str, list[str]]) -> str | None:
    """The bundle that has a module; None: it does not travel."""
    for bundle, modules in bundles.items():
        if module in modules or module == f"dynmoe.{bundle}":
            return bundle
    return None


def _bundle(bundle: str, modules: list[str], bundles: dict[str, list[str]]) -> str:
    """Some modules as one, with all imports at its top."""
    imports: set[str] = set()
    bodies = []
    for name in modules:
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        text = Path(spec.origin).read_text()
        tree = ast.parse(text)
        first = tree.body[0]
        assert isinstance(first, ast.Expr)  # the module's docstring becomes a comment
        assert first.end_lineno is not None
        heading = "\n".join(f"# {line}".rstrip() for line in ast.literal_eval(first.value).splitlines())
        imports |= {line for node in _imports(tree) for line in _travelling(node, bundle, bundles)}
        bodies.append(
            f"# --- {name.rpartition('.')[2]}\n{heading}\n\n\n{_without_imports(text, tree, first.end_lineno)}"
        )
    head = f'"""{_HEADS[bundle]} of DynMoE, as they were when these weights were exported. Made by dynmoe.hf."""'
    return "\n".join([head, "", _FUTURE, "", *sorted(imports - {_FUTURE}), "", "", "\n\n\n".join(bodies), ""])


def _imports(tree: ast.Module) -> list[ast.Import | ast.ImportFrom]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]


def _without_imports(text: str, tree: ast.Module, start: int) -> str:
    """A module from line ``start`` on, without imports, those within functions and for type checkers included."""
    lines = text.splitlines()
    blocks = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    gone: set[int] = set(range(start))
    for node in [*blocks, *_imports(tree)]:
        assert node.end_lineno is not None
        # An import within a function has a blank line after it.
        blank = node.col_offset > 0 and node.end_lineno < len(lines) and not lines[node.end_lineno].strip()
        gone |= set(range(node.lineno - 1, node.end_lineno + blank))
    return "\n".join(line for number, line in enumerate(lines) if number not in gone).strip()


def _travelling(node: ast.Import | ast.ImportFrom, bundle: str, bundles: dict[str, list[str]]) -> set[str]:
    """An import as the exported module has it: none of what stands in the module itself, or does not travel."""
    module = node.module if isinstance(node, ast.ImportFrom) else None
    home = None if module is None else _home(module, bundles)
    if module is None or (home is None and not module.startswith("dynmoe.")):
        return {ast.unparse(node)}
    if home in (None, bundle):
        return set()
    return {f"from .{home}_dynmoe import {', '.join(alias.name for alias in node.names)}"}
