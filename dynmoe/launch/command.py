"""python -m dynmoe.launch: job scripts for Slurm, and checks before and after a start for the scripts in launch/."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

from dynmoe.config import Config, load_config
from dynmoe.errors import UserError
from dynmoe.launched import address_towards

_USAGE = """%(prog)s slurm CONFIG --nodes N --gpus G --time T [key=value ...]   writes a job script
       %(prog)s begin CONFIG --ranks N [--node I] [key=value ...]      checks and records a start; for scripts
       %(prog)s after CONFIG [key=value ...]                           why the start ended, and what should follow
       %(prog)s address HOST                                           the address of this host as HOST sees it"""

# Copied into the job script unchanged.
_SBATCH_OPTIONS = ("partition", "account", "qos", "constraint", "exclude", "mem")


def main() -> None:
    name = sys.argv[0] if Path(sys.argv[0]).name != "__main__.py" else "python -m dynmoe.launch"
    parser = argparse.ArgumentParser(name, usage=_USAGE, description=__doc__, allow_abbrev=False)
    verbs: dict[str, Callable[[str, list[str]], None]] = {
        "slurm": _slurm, "begin": _begin, "after": _after, "address": _address,
    }  # fmt: skip
    parser.add_argument("verb", choices=verbs, help=argparse.SUPPRESS)
    verb = parser.parse_args(sys.argv[1:2]).verb
    verbs[verb](f"{name} {verb}", sys.argv[2:])


def _parser(name: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(name, description=description, allow_abbrev=False)
    parser.add_argument("config", metavar="CONFIG", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration fields to override")
    return parser


def _load(given: argparse.Namespace) -> Config:
    return load_config(given.config, given.overrides)


def _slurm(name: str, arguments: list[str]) -> None:
    parser = _parser(name, "Writes a job script after checking that the configuration fits the nodes and ranks.")
    parser.add_argument(
        "--nodes", type=_node_range, required=True, metavar="N", help="number of nodes; MIN-MAX: as many as are free"
    )
    parser.add_argument("--gpus", type=int, required=True, help="GPUs per node, one rank each; 0: use --ranks")
    parser.add_argument("--ranks", type=int, default=1, help="ranks per node if --gpus is 0 (default: %(default)s)")
    parser.add_argument(
        "--time", required=True, help="time limit of one start, e.g. 24:00:00; the job is then requeued"
    )
    parser.add_argument(
        "--grace", type=int, default=300, metavar="S", help="seconds before the time limit at which the run saves and "
        "stops; longer than its longest step, evaluation and checkpoint together (default: %(default)s)",
    )  # fmt: skip
    for option in _SBATCH_OPTIONS:
        parser.add_argument(f"--{option}", help=f"passed to sbatch as --{option}")
    parser.add_argument("--output", type=Path, help="file for the job script (default: run.name.sbatch)")
    given = parser.parse_intermixed_args(arguments)
    from dynmoe.launch.slurm import Resources, job_script

    options = {option: value for option in _SBATCH_OPTIONS if (value := getattr(given, option)) is not None}
    fewest, nodes = given.nodes
    resources = Resources(nodes, given.gpus, given.gpus or given.ranks, given.time, given.grace, options, fewest)
    config = _load(given)
    script = job_script(config, given.config, given.overrides, resources)
    output = given.output or Path(f"{config.run.name}.sbatch")
    try:
        output.write_text(script)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error.strerror}); use another path") from None
    print(f"{output}: {resources.shown_nodes} nodes with {resources.ranks} ranks each; submit it with sbatch {output}")


def _node_range(text: str) -> tuple[int, int]:
    """The smallest and the largest number of nodes in N or MIN-MAX."""
    if not re.fullmatch(r"\d+(-\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number or a range; write N or MIN-MAX, such as 1-4")
    fewest, _, most = text.partition("-")
    return int(fewest), int(most or fewest)


def _begin(name: str, arguments: list[str]) -> None:
    parser = _parser(
        name,
        "Checks configuration, layout and data, records the start, and prints the number of ranks to "
        "start, a space and the run directory.",
    )
    parser.add_argument("--ranks", type=int, required=True, help="number of available ranks on all nodes")
    parser.add_argument("--node", type=int, default=0, help="index of this node (default: %(default)s)")
    parser.add_argument(
        "--patience", type=float, default=5.0, metavar="S",
        help="seconds to wait for another job in the run directory to end (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--port", type=int, help="port on this node where the first rank will listen")
    parser.add_argument("--merged", type=Path, help="file for the merged configuration")
    given = parser.parse_intermixed_args(arguments)
    config = _load(given)
    from dynmoe.launch.starts import begin, check_port

    if given.port is not None:
        check_port(given.port, given.patience)
    start = begin(config, given.ranks, given.node, given.patience)
    if given.merged is not None:
        given.merged.write_text(config.to_yaml())
    if start.change and given.node == 0:
        print(f"{start.directory.path}: {start.change}", file=sys.stderr)
    print(start.ranks, start.directory.path)


def _address(name: str, arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(name, description="Prints the address of this host as HOST sees it.")
    parser.add_argument("host", metavar="HOST", help="MASTER_ADDR of the launch")
    host = parser.parse_args(arguments).host
    try:
        print(address_towards(host))
    except OSError as error:
        raise UserError(
            f"MASTER_ADDR {host}: {error.strerror}; use a name or IPv4 address that this host knows"
        ) from None


def _after(name: str, arguments: list[str]) -> None:
    parser = _parser(
        name, "Prints how a start ended, then the first failing rank's traceback. Exit status: 0 finished, 75 stopped "
        "on request, 76 failed but can resume, 2 invalid configuration or data, 3 too many starts without progress.",
    )  # fmt: skip
    parser.add_argument(
        "--starts-without-progress",
        type=int,
        default=3,
        metavar="N",
        help="maximum number of consecutive starts without progress (default: %(default)s)",
    )
    parser.add_argument("--node", type=int, default=0, help="index of this node (default: %(default)s)")
    given = parser.parse_intermixed_args(arguments)
    config = _load(given)
    from dynmoe.launch.starts import FINISHED, STOP_REQUESTED, after, describe_failures
    from dynmoe.train.run_directory import RunDirectory

    directory = RunDirectory(config.run.path)
    verdict = after(directory, given.starts_without_progress, given.node)
    print(f"{directory.path}: {verdict.reason}", flush=True)
    if verdict.status not in (FINISHED, STOP_REQUESTED) and (failures := describe_failures(directory)):
        print(failures, file=sys.stderr, flush=True)
    raise SystemExit(verdict.status)
