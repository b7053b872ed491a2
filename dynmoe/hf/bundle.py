"""The modeling code that travels with the weights: our own files, with nothing of the project left to import."""

from __future__ import annotations

import ast
import re
from pathlib import Path

_HERE = Path(__file__).parent
_MODULES = ("configuration_dynmoe", "serving_dynmoe", "attention_dynmoe", "moe_dynmoe", "modeling_dynmoe")
# Packages of which some files become one, in the order in which they need each other.
_BUNDLES = {
    "routing": ("plan", "selection", "top_k", "top_p", "top_any", "sigmoid", "relu", "null_experts",
                "expert_threshold", "losses"),
    "ops": ("permute", "swiglu", "backends", "opaque"),
}  # fmt: skip
_HEADS = {"routing": "Routing formulas", "ops": "Routed experts"}


def write_code(directory: Path) -> None:
    """Writes the files that ``auto_map`` names, and those that they import."""
    for package, names in _BUNDLES.items():
        (directory / f"{package}_dynmoe.py").write_text(_bundle(package, names))
    for name in _MODULES:
        text = (_HERE / f"{name}.py").read_text()
        for package in _BUNDLES:
            text = re.sub(rf"from dynmoe\.{package}[.\w]* import", f"from .{package}_dynmoe import", text)
        text = re.sub(r"from dynmoe\.hf\.(\w+) import", r"from .\1 import", text)
        (directory / f"{name}.py").write_text(text)


def _bundle(package: str, names: tuple[str, ...]) -> str:
    """Some files of a package as one module."""
    imports: set[str] = set()
    bodies = []
    for name in names:
        text = (_HERE.parent / package / f"{name}.py").read_text()
        tree = ast.parse(text)
        lines = text.splitlines()
        for node in tree.body:
            if not isinstance(node, ast.Import | ast.ImportFrom):
                continue
            if not (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dynmoe.")):
                imports |= {ast.unparse(node)}
            assert node.end_lineno is not None
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
        first = tree.body[0]
        assert isinstance(first, ast.Expr)  # the module's docstring becomes a comment
        assert first.end_lineno is not None
        heading = "\n".join(f"# {line}".rstrip() for line in ast.literal_eval(first.value).splitlines())
        bodies.append(f"# --- {name}\n{heading}\n\n\n" + "\n".join(lines[first.end_lineno :]).strip())
    future = "from __future__ import annotations"
    head = f'"""{_HEADS[package]} of DynMoE, as they were when these weights were exported. Made by dynmoe.hf."""'
    return "\n".join([head, "", future, "", *sorted(imports - {future}), "", "", "\n\n\n".join(bodies), ""])
