"""dynmoe VERB, the same as python -m dynmoe.VERB: what can be done with a run besides training it."""

from __future__ import annotations

import importlib
import sys

from dynmoe.cli import run_tool
from dynmoe.errors import UserError

VERBS = {
    "checkpoint": "list, verify, show and prune the checkpoints of a run",
    "compact": "write a run's checkpoint without the experts that adaptation removed",
    "convert": "write a run's checkpoint for the other engine",
    "evaluate": "score a run on tasks and domains, with the experts of each",
    "generate": "continue texts, with the experts of each token",
    "hf": "write a run as a model of Hugging Face, or begin a run from one",
    "launch": "write a Slurm job for a configuration; what the scripts in launch/ ask before and after a start",
    "plan": "memory, traffic and speed of a configuration on so many GPUs, and layouts that fit",
    "report": "write pages about runs: curves and loads, tokens with their experts, a W&B dashboard",
    "warmstart": "begin a run from a dense or a top-k one",
}


def main() -> None:
    verb = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if verb in ("-h", "--help"):
        print("usage: dynmoe VERB ...; dynmoe VERB --help says more\n")
        print("\n".join(f"  {name:11}{phrase}" for name, phrase in VERBS.items()))
        return
    if verb not in VERBS:
        raise UserError(f"dynmoe {verb}: no such verb; use one of {', '.join(VERBS)}")
    sys.argv = [f"dynmoe {verb}", *sys.argv[2:]]
    importlib.import_module(f"dynmoe.{verb}").main()


def console_script() -> None:
    """Entry point of the installed command."""
    run_tool(main)


if __name__ == "__main__":
    console_script()
