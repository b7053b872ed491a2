"""python -m bench NAME [--json FILE] [--plot FILE]; python -m bench all"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from bench import (
    collectives,
    data_prep,
    data_prep_peer,
    decoding,
    dispatch,
    end_to_end,
    faults,
    findings,
    generation,
    gpu_day,
    gpu_layer,
    gpu_smoke,
    gradient_watch,
    growth,
    imbalance,
    launches,
    layer,
    machine_code,
    memory,
    router,
    routing,
    saving,
    served,
    since,
    soak,
    statistics,
    wire,
    zero_computation,
)
from bench.report import Rows, current_commit, markdown, print_table, with_sections, without_details, write_json
from dynmoe.cli import Help, run_tool
from dynmoe.errors import UserError

# In the order of docs/performance.md; the others are training runs without a section there.
BENCHMARKS: dict[str, ModuleType] = {
    "layer": layer, "dispatch": dispatch, "growth": growth, "imbalance": imbalance, "memory": memory,
    "launches": launches, "wire": wire, "end_to_end": end_to_end, "router": router, "statistics": statistics,
    "saving": saving, "decoding": decoding, "generation": generation, "collectives": collectives,
    "gradient_watch": gradient_watch, "data_prep": data_prep, "data_prep_peer": data_prep_peer, "since": since,
    "zero_computation": zero_computation,
    "machine_code": machine_code, "gpu_day": gpu_day, "faults": faults, "findings": findings, "gpu_layer": gpu_layer,
    "gpu_smoke": gpu_smoke, "routing": routing, "served": served, "soak": soak,
}  # fmt: skip
_OTHERS = ("faults", "findings", "gpu_layer", "gpu_smoke", "routing", "served", "soak")
_OF_ALL = [name for name in BENCHMARKS if name not in _OTHERS]
# Without a GPU, what it writes is a rehearsal.
_BY_DEFAULT = [name for name in _OF_ALL if name != "gpu_day"]


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench", description="Benchmarks that report ratios within one run.")
    names = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    for name, module in BENCHMARKS.items():
        sub = _add(names, name, str(module.__doc__).splitlines()[0])
        sub.add_argument("--json", type=Path, help="file for the rows")
        if hasattr(module, "plot"):
            sub.add_argument("--plot", type=Path, help="file for a plot of the rows (needs matplotlib)")
        module.add_arguments(sub)
    every = _add(names, "all", "Runs all benchmarks with defaults and writes a page with tables and plots.")
    every.add_argument(
        "--only", nargs="*", default=_BY_DEFAULT, choices=_OF_ALL, help="benchmarks to run; none: only the page"
    )
    every.add_argument("--page", type=Path, default=Path("docs/performance.md"))
    every.add_argument("--figures", type=Path, default=Path("docs/figures"), help="directory of JSON files and plots")
    given = parser.parse_args()
    if given.name == "all":
        run_all(given)
        return
    module = BENCHMARKS[given.name]
    commit = current_commit()
    rows = module.run(given)
    if given.json is not None:  # first, because a measurement can take hours
        write_json(given.json, rows, commit)
    _show(given.name, module, rows)
    if hasattr(module, "plot") and given.plot is not None:
        _draw(module, rows, given.plot)
    if hasattr(module, "failures") and (found := module.failures(rows)):
        raise UserError(f"bench {given.name}: {'; '.join(found)}")


def _add(names: argparse._SubParsersAction, name: str, phrase: str) -> argparse.ArgumentParser:
    return names.add_parser(name, help=phrase, formatter_class=Help)


def run_all(given: argparse.Namespace) -> None:
    """Runs the benchmarks one by one, each in its own process, and writes the page from their JSON files.

    Existing results, from whatever machine, stay on the page until they are measured again. So do sections that no
    benchmark writes.
    """
    _pyplot()  # fails early, not after the first benchmark
    given.figures.mkdir(parents=True, exist_ok=True)
    for name in given.only:
        command = [sys.executable, "-m", "bench", name, "--json", str(given.figures / f"{name}.json")]
        if hasattr(BENCHMARKS[name], "plot"):
            command += ["--plot", str(given.figures / f"{name}.png")]
        if subprocess.run(command, check=False).returncode:
            print(f"{name}: failed and skipped, see above", flush=True)
    sections = [_section(name, given) for name in _OF_ALL if (given.figures / f"{name}.json").exists()]
    page = given.page.read_text() if given.page.exists() else ""
    given.page.write_text(with_sections(page, _HEAD, sections))
    print(f"wrote {given.page}")


_HEAD = """# Performance

Written by `python -m bench all`; `python -m bench NAME` runs one benchmark with other sizes. Times are compared as
ratios: the methods take turns, within one process where that is possible, and medians are reported. Ratios are
meaningful on shared machines; absolute times are not. Layers that are given the same routing are first checked to
agree. `docs/log.md` explains the figures.
"""


def _section(name: str, given: argparse.Namespace) -> str:
    module = BENCHMARKS[name]
    document = json.loads((given.figures / f"{name}.json").read_text())
    rows = without_details(document["rows"])
    title, _, explanation = str(module.__doc__).partition("\n")
    picture = f"figures/{name}.png" if (given.figures / f"{name}.png").exists() else None
    section = markdown(title, rows, _verdicts(module, document["rows"]), picture)
    where = f"On: {document['machine']}; torch {document['torch']}; code of commit {document['commit']}.\n"
    heading, _, rest = section.partition("\n")
    parts = [markdown(row["part"], row["rows"], [], None, 3) for row in document["rows"] if row.get("rows")]
    before = [heading, "", *([explanation.strip(), ""] if explanation.strip() else []), where]
    return "\n".join([*before, rest.lstrip(), *parts])


def _verdicts(module: ModuleType, rows: Rows) -> list[str]:
    return module.verdicts(rows) if hasattr(module, "verdicts") else []


def _show(name: str, module: ModuleType, rows: Rows) -> None:
    print_table(name, without_details(rows))
    for line in _verdicts(module, rows):
        print(line)


def _pyplot() -> ModuleType:
    try:
        import matplotlib
    except ImportError:
        raise UserError("plots: matplotlib is not installed; run pip install 'dynmoe[dev]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _draw(module: ModuleType, rows: Rows, path: Path) -> None:
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    module.plot(rows, axes)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    run_tool(main)
