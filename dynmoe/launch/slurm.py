"""Writes a Slurm job script for one configuration. The job itself runs launch/slurm.sbatch."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dynmoe.config import Config
from dynmoe.errors import UserError
from dynmoe.launch.elastic import largest_fit

_TIME = re.compile(r"(\d+-\d{1,2}(:\d{2}){0,2}|\d+(:\d{2}){0,2})")
# Also lists of hosts, as node[03-05], and constraints, as a100|h100. To bash, #SBATCH lines are comments.
_VALUE = re.compile(r"[A-Za-z0-9_.:,=*%/+&|!()\[\]-]+")


@dataclass(frozen=True)
class Resources:
    """Resources that a job requests from Slurm.

    Attributes:
        nodes: number of nodes at most; see ``fewest``.
        gpus: GPUs per node; 0: ``ranks`` processes on CPUs.
        ranks: ranks per node.
        time: time limit in Slurm's notation.
        grace_s: seconds before the limit at which the run is asked to save and stop.
        options: further sbatch options by name (partition, account, ...).
        fewest: number of nodes on which the job may start if there are not more; None: ``nodes``.
    """

    nodes: int
    gpus: int
    ranks: int
    time: str
    grace_s: int
    options: dict[str, str]
    fewest: int | None = None

    @property
    def shown_nodes(self) -> str:
        """Number of nodes in Slurm's notation: N or MIN-MAX."""
        return str(self.nodes) if self.fewest in (None, self.nodes) else f"{self.fewest}-{self.nodes}"

    def __post_init__(self) -> None:
        if self.nodes < 1 or self.ranks < 1:
            raise UserError(f"--nodes {self.nodes}, {self.ranks} ranks each: must both be at least 1; use 1 or more")
        if self.fewest is not None and not 1 <= self.fewest <= self.nodes:
            raise UserError(f"--nodes {self.shown_nodes}: is not a range; write MIN-MAX, such as 1-4")
        if not _TIME.fullmatch(self.time):
            raise UserError(f"--time {self.time}: is not in Slurm's notation; write e.g. 24:00:00 or 2-12:00:00")
        if self.grace_s >= _seconds(self.time):
            raise UserError(f"--grace {self.grace_s}: is not below --time {self.time}; use a longer time or less grace")
        if not 0 < self.grace_s < 65536:
            raise UserError(f"--grace {self.grace_s}: Slurm accepts 1 to 65535 seconds; use one of these")
        for name, value in self.options.items():
            if not _VALUE.fullmatch(value):
                problem = "has characters that a job script cannot hold"
                raise UserError(f"--{name} {value!r}: {problem}; leave out spaces, quotes and #")


def _seconds(time: str) -> int:
    """Parses Slurm's notation: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]]."""
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours = 0
        minutes, seconds = (*parts, 0)[:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def job_script(config: Config, path: str, overrides: Sequence[str], resources: Resources) -> str:
    """Returns the job script: resources, then a call of launch/slurm.sbatch with this configuration.

    A job on a range of nodes may adapt at each start, unless the configuration says never (``parallel.elastic``).

    Raises:
        UserError: parallel sizes or batches do not fit the ranks, or launch/slurm.sbatch is missing.
    """
    config.check_world(resources.nodes * resources.ranks)
    elastic = []
    for nodes in range(resources.fewest or resources.nodes, resources.nodes):
        if config.parallel.elastic == "never":
            config.check_world(nodes * resources.ranks)
        else:
            largest_fit(config, nodes * resources.ranks)
            elastic = ["parallel.elastic=always"]
    root = Path(__file__).resolve().parents[2]
    if not (root / "launch" / "slurm.sbatch").exists():
        raise UserError(f"{root}: contains no launch/slurm.sbatch; install the project with pip install --editable")
    lines = {
        "job-name": config.run.name,
        "nodes": resources.shown_nodes,  # of a range, Slurm gives the fewest if --ntasks-per-node is set
        **({"gpus-per-node": resources.gpus} if resources.gpus else {}),
        "time": resources.time,
        "signal": f"USR1@{resources.grace_s}",
        "open-mode": "append",
        "output": f"{config.run.name}-%j.out",
        **resources.options,
    }
    whole = ["#SBATCH --exclusive", *([] if "mem" in resources.options else ["#SBATCH --mem=0"])]
    header = "\n".join([*(f"#SBATCH --{name}={value}" for name, value in lines.items()), *whole])
    # The job runs in the project's directory, wherever this script is written.
    arguments = " ".join(shlex.quote(argument) for argument in (str(Path(path).resolve()), *overrides, *elastic))
    return f"""#!/usr/bin/env bash
# {config.run.name}: {resources.shown_nodes} x {resources.ranks} ranks. Written by python -m dynmoe.launch slurm.
{header}
#SBATCH --requeue

export DYNMOE_ROOT={shlex.quote(str(root))}
export NPROC_PER_NODE={resources.ranks}
set -- {arguments}
source "$DYNMOE_ROOT/launch/slurm.sbatch"
"""
