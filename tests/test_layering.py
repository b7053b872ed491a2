"""Imports run one way: a module may use what stands below it, never what stands above."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the ground up; packages on one line do not know each other.
LAYERS = [
    {"errors", "launched", "lock"},
    {"fields", "routing"},
    {"routers"},
    {"config"},
    {"ops"},
    {"moe"},
    {"model", "data"},
    {"train"},
    {"engines"},
    {"cli"},
    {"convert"},  # the verbs: python -m dynmoe.VERB
    {"checkpoint", "compact", "launch", "plan", "traces", "trained"},
    {"extend", "generate", "hf", "report", "warmstart"},
    {"evaluate"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# Each engine's package has one place; datasets are the exception that the design names.
OWNERS = {
    "deepspeed": "dynmoe/engines/deepspeed",
    "megatron": ("dynmoe/engines/megatron/", "dynmoe/data/megatron.py"),
    "lm_eval": "dynmoe/evaluate/harness",
    "transformers": "dynmoe/hf/",
    "wandb": ("dynmoe/train/wandb_", "dynmoe/report/dashboard.py"),
}
OUTSIDE = ("data_prep", "bench", "harness", "tests", "train")  # what dynmoe does not import
MODULES = sorted(path for folder in ("dynmoe", "data_prep") for path in (ROOT / folder).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Every module that a file imports anywhere: at the top, in a function, under TYPE_CHECKING."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def package(module: str) -> str:
    """``errors`` of ``dynmoe.errors.ConfigError``; '' for dynmoe itself."""
    parts = module.split(".")
    return parts[1] if parts[0] == "dynmoe" and len(parts) > 1 else ""


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_point_down(path):
    relative = path.relative_to(ROOT)
    own = relative.parts[1].removesuffix(".py") if relative.parts[0] == "dynmoe" else ""
    for module in imports(path):
        top = module.split(".")[0]
        if top == "dynmoe" and own not in ("", "__init__", "__main__") and package(module) != own:
            assert LEVEL[package(module)] < LEVEL[own], f"{relative} imports {module}"
        if top in OWNERS:
            assert relative.as_posix().startswith(OWNERS[top]), f"{relative} imports {module}"
        assert top not in OUTSIDE or relative.parts[0] == top, f"{relative}: {module}"


@pytest.mark.parametrize(("folder", "others"), [
    ("tests", {"bench"}), ("bench", {"tests"}), ("harness", {"bench", "tests"}),
])  # fmt: skip
def test_tests_and_benchmarks_share_code_only_through_the_harness(folder, others):
    paths = {path for path in (ROOT / folder).rglob("*.py") if "golden" not in path.parts}
    for path in paths - set((ROOT / "tests").glob("test_bench*.py")):  # which test the benchmarks
        assert not {module.split(".")[0] for module in imports(path)} & others, path


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_modules_do_not_import_each_other_in_a_circle():
    """Within packages too, with imports in functions and for type checkers: none hides a circle."""
    names = {module_name(path) for path in MODULES}
    graph = {
        module_name(path): {found if found in names else found.rpartition(".")[0] for found in imports(path)} & names
        for path in MODULES
    }
    assert len(list(TopologicalSorter(graph).static_order())) == len(names)
    graph["dynmoe.errors"] = {"dynmoe.moe.layer"}
    with pytest.raises(CycleError):
        list(TopologicalSorter(graph).static_order())


def test_every_package_has_its_level():
    assert {
        path.name.removesuffix(".py") for path in (ROOT / "dynmoe").iterdir() if not path.name.startswith("_")
    } == set(LEVEL)


def test_the_ground_floor_knows_torch_and_itself_only():
    for path in (ROOT / "dynmoe" / "routing").glob("*.py"):
        assert {module.split(".")[0] for module in imports(path)} <= {"__future__", "torch", "dataclasses", "math",
                                                                     "typing", "dynmoe"}  # fmt: skip
        assert all(package(module) in ("routing", "") for module in imports(path))
