"""python -m dynmoe.report: the report of runs, the token view, scores by budget, and the W&B dashboard."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from dynmoe.errors import UserError

_USAGE = """%(prog)s RUN [RUN ...] [--output FILE]      one page about a run, or about several runs in comparison
       %(prog)s tokens RUN [--text FILE ...]       a text, with the experts that each token used
       %(prog)s budget RUN [RUN ...]               scores against experts per token
       %(prog)s dashboard RUN                      the W&B dashboard, as code"""


def main() -> None:
    program = Path(sys.argv[0]).name
    arguments = sys.argv[1:]
    name = sys.argv[0] if program != "__main__.py" else "python -m dynmoe.report"
    if arguments[:1] == ["tokens"]:
        _tokens(f"{name} tokens", arguments[1:])
    elif arguments[:1] == ["budget"]:
        _budget(f"{name} budget", arguments[1:])
    elif arguments[:1] == ["dashboard"]:
        _dashboard(f"{name} dashboard", arguments[1:])
    else:
        _report(name, arguments)


def _report(name: str, arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(name, usage=_USAGE, description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="directory of a run")
    parser.add_argument(
        "--output", type=Path, help="the page; default: report.html in RUN, or in this directory for several runs"
    )
    given = parser.parse_args(arguments)
    # Imported after the arguments are checked, because plotly loads slowly.
    from dynmoe.report.page import write_report
    from dynmoe.report.runs import read_runs

    output = given.output or (given.runs[0] if len(given.runs) == 1 else Path()) / "report.html"
    runs = read_runs(given.runs)
    for run in runs:
        for problem in run.problems:
            print(f"{run.path}: {problem}")
    _check_folder(output)
    write_report(runs, output)
    print(f"Report: {output}")


def _tokens(name: str, arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        name, description="Runs a checkpoint on text and writes a page that shows the experts of each token."
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="directory of a run")
    parser.add_argument(
        "--text", nargs="+", metavar="FILE", help="text files, or JSON lines with text and source; -: standard input; "
        "each file is its own source. Default: validation text of the run's corpora",
    )  # fmt: skip
    parser.add_argument("--tokens", type=int, default=8192, metavar="N", help="maximum number of tokens (%(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is a GPU")
    parser.add_argument("--output", type=Path, help="the page, with a .json file next to it; default: RUN/tokens.html")
    given = parser.parse_args(arguments)
    if given.tokens < 1:
        raise UserError(f"--tokens={given.tokens}: is too small; use 1 or more")
    from dynmoe.data.tokenizer_files import TOKENIZER_FILES

    output = given.output or given.run / "tokens.html"
    data = output.with_suffix(".json")
    if output.suffix != ".html" or data.name in ("outcome.json", "dashboard.json", *TOKENIZER_FILES):
        raise UserError(f"--output={output}: its data would overwrite {data.name}; use another name that ends in .html")
    _check_folder(output)
    import torch

    from dynmoe.report.texts import read_texts, validation_texts
    from dynmoe.report.tokens import view_tokens, write_view
    from dynmoe.trained import open_trained

    texts = None if given.text is None else read_texts(given.text)
    model = open_trained(given.run, None if given.device is None else torch.device(given.device))
    view = view_tokens(model, validation_texts(model, given.tokens) if texts is None else texts, given.tokens)
    write_view(view, output)
    mean = sum(row["mean"] for row in view["tables"]["layers"]) / len(view["tables"]["layers"])
    print(f"{len(view['tokens'])} tokens used {mean:.2f} experts on average over the layers.")
    print(f"Token view: {output} (data: {data})")


def _budget(name: str, arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        name, description="Draws the scores of runs against experts per token: of runs that python -m dynmoe.evaluate "
        "RUN --experts-per-token scored at several budgets, and of others at their own.",
    )  # fmt: skip
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="directory of a run")
    parser.add_argument("--output", type=Path, help="the page; default: budget.html in the first RUN")
    given = parser.parse_args(arguments)
    from dynmoe.report.budget import write_budget_page
    from dynmoe.report.runs import read_runs

    output = given.output or given.runs[0] / "budget.html"
    runs = read_runs(given.runs)
    _check_folder(output)
    write_budget_page(runs, output)
    print(f"Scores by experts per token: {output}")


def _dashboard(name: str, arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(name, description="Builds the W&B dashboard of a run's project.")
    parser.add_argument("run", type=Path, metavar="RUN", help="directory of a run of the project")
    parser.add_argument("--entity", default="", help="W&B user or team; default: the current login")
    parser.add_argument(
        "--output", type=Path, help="file for the definition if W&B is unreachable; default: dashboard.json in RUN"
    )
    given = parser.parse_args(arguments)
    from dynmoe.config import load_config
    from dynmoe.report.dashboard import publish

    output = given.output or given.run / "dashboard.json"
    config = load_config(given.run / "config.yaml")
    _check_folder(output)
    print(publish(config, given.entity, output))


def _check_folder(output: Path) -> None:
    if not output.parent.is_dir():
        raise UserError(f"--output={output}: {output.parent} is not a directory; create it, or use another path")
    if not os.access(output.parent, os.W_OK):
        raise UserError(f"--output={output}: {output.parent} is not writable; use another path")
