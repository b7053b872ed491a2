"""A Slurm of two nodes, n1 and n2, on this machine."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

_TOOLS = ("slurmctld", "slurmd", "sbatch", "munged")
_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
_CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MpiDefault=none
JobRequeue=1
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=1000 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP
"""


def why_no_slurm() -> str | None:
    """Why this machine cannot play a Slurm cluster; None where it can."""
    if os.geteuid() != 0:
        return "Slurm's daemons need root"
    missing = [tool for tool in _TOOLS if shutil.which(tool, path=_PATH) is None]
    return f"not installed: {', '.join(missing)} (slurm-wlm, munge)" if missing else None


class SlurmCluster:
    """Slurm's daemons, and the commands of its users."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._environment = os.environ | {"PATH": _PATH, "SLURM_CONF": str(folder / "slurm.conf")}

    def __enter__(self) -> SlurmCluster:
        (self._folder / "state").mkdir(parents=True)
        for parent in [self._folder, *self._folder.parents][:4]:  # munged's user must pass
            parent.chmod(parent.stat().st_mode | 0o011)
        munge = pwd.getpwnam("munge")
        self._munge = self._folder / "munge"
        self._munge.mkdir(mode=0o711)
        (self._munge / "key").write_bytes(os.urandom(128))
        (self._munge / "key").chmod(0o600)
        for path in (self._munge, self._munge / "key"):
            os.chown(path, munge.pw_uid, munge.pw_gid)
        own = self._munge / "socket"
        options = [f"--socket={own}", f"--key-file={self._munge}/key", f"--pid-file={self._munge}/pid"]
        files = [f"--log-file={self._munge}/log", f"--seed-file={self._munge}/seed"]
        self._run(["runuser", "-u", "munge", "--", "munged", *options, *files])
        text = _CONFIGURATION.format(host=socket.gethostname().split(".")[0], folder=self._folder, ports=_free_ports())
        (self._folder / "slurm.conf").write_text(text)
        self._run(["slurmctld"])
        self._run(["slurmd", "-N", "n1"])
        self._run(["slurmd", "-N", "n2"])
        deadline = time.monotonic() + 30
        while self._run(["sinfo", "-h", "-o", "%T"], check=False).split() != ["idle"]:
            assert time.monotonic() < deadline, (self._folder / "slurmctld.log").read_text()
            time.sleep(0.5)
        return self

    def __exit__(self, *_: object) -> None:
        for state in ("PENDING", "RUNNING"):
            self._run(["scancel", f"--state={state}", "--user=root"], check=False)
        deadline = time.monotonic() + 60
        while self._run(["squeue", "-h"], check=False).strip() and time.monotonic() < deadline:
            time.sleep(0.5)
        for name in ("slurmd.n1.pid", "slurmd.n2.pid", "slurmctld.pid", "munge/pid"):
            file = self._folder / name
            if file.exists():
                subprocess.run(["kill", file.read_text().strip()], check=False)

    def _run(self, command: list[str], check: bool = True, **environment: str) -> str:
        done = subprocess.run(
            command, env=self._environment | environment, check=False, capture_output=True, text=True, timeout=60,
            cwd=Path(__file__).parents[2],
        )  # fmt: skip
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, *arguments: str, **environment: str) -> str:
        """The id of the new job."""
        return self._run(["sbatch", "--parsable", *arguments], **environment).strip()

    def facts(self, job: str) -> dict[str, str]:
        """What Slurm says of a job, such as JobState and Restarts."""
        words = self._run(["scontrol", "--oneliner", "show", "job", job]).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def requeue(self, job: str) -> None:
        self._run(["scontrol", "requeue", job])

    def drain(self, node: str) -> None:
        """Gives a node no further jobs."""
        self._run(["scontrol", "update", f"NodeName={node}", "State=DRAIN", "Reason=test"])

    def restore(self, node: str) -> None:
        self._run(["scontrol", "update", f"NodeName={node}", "State=RESUME"])

    def wait(self, job: str, timeout_s: float) -> str:
        """The state in which a job ended. A requeued one, which Slurm holds back for two minutes, starts at once."""
        ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        return self._wait_for(job, lambda facts: facts["JobState"] in ends, timeout_s)["JobState"]

    def nodes_after_restart(self, job: str, restarts: int, timeout_s: float) -> str:
        """Number of nodes on which a job runs after it was requeued ``restarts`` times."""
        expected = {"JobState": "RUNNING", "Restarts": str(restarts)}
        return self._wait_for(job, lambda facts: expected.items() <= facts.items(), timeout_s)["NumNodes"]

    def _wait_for(self, job: str, condition: Callable[[dict[str, str]], bool], timeout_s: float) -> dict[str, str]:
        deadline = time.monotonic() + timeout_s
        while True:
            facts = self.facts(job)
            if condition(facts):
                return facts
            if facts["JobState"] == "PENDING" and facts["Reason"] == "BeginTime":
                time.sleep(2)  # in the second of its requeue a node takes it for the old one
                self._run(["scontrol", "update", f"JobId={job}", "StartTime=now"], check=False)
            assert time.monotonic() < deadline, f"{facts}"
            time.sleep(0.5)


def _free_ports() -> list[int]:
    sockets = [socket.socket() for _ in range(3)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
