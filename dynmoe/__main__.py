"""The command dynmoe VERB, the same as python -m dynmoe.VERB: tools for runs other than training."""

from __future__ import annotations

import importlib
import sys

from dynmoe.cli import run_tool
from dynmoe.errors import UserError

VERBS = {
    "checkpoint": "list, verify, show and prune the checkpoints of a run",
    "compact": "remove inactive experts from the checkpoint of a run",
    "convert": "convert the checkpoint of a run to the other engine",
    "evaluate": "score a run on tasks and domains, with experts per token",
    "extend": "start a run with longer sequences from the weights of another one",
    "generate": "continue texts, with the experts of each token",
    "hf": "export a run as a Hugging Face model, or start a run from one",
    "launch": "write a Slurm job for a configuration; also used by the scripts in launch/",
    "plan": "estimate memory, traffic and speed of a configuration on a number of GPUs, and find layouts that fit",
    "report": "write pages about runs: curves and loads, tokens with their experts, a W&B dashboard",
    "traces": "convert routing traces to the layout of the FLAME-MoE traces, and back",
    "warmstart": "start a run from a dense or a top-k run",
}


def main() -> None:
    verb = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if verb in ("-h", "--help"):
        print("usage: dynmoe VERB ...; dynmoe VERB --help lists the options\n")
        print("\n".join(f"  {name:11}{phrase}" for name, phrase in VERBS.items()))
        return
    if verb not in VERBS:
        raise UserError(f"dynmoe {verb}: unknown verb; use one of {', '.join(VERBS)}")
    sys.argv = [f"dynmoe {verb}", *sys.argv[2:]]
    importlib.import_module(f"dynmoe.{verb}").main()


def console_script() -> None:
    """Entry point of the installed command."""
    run_tool(main)


if __name__ == "__main__":
    console_script()
