"""Several hosts on one machine: each has its own network, processes, name and sshd, and all share the file system."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

_TOOLS = ("ip", "unshare", "nsenter", "sshd", "ssh", "ssh-keygen", "pdsh")
_NETWORK = "10.87.0"
_SSH = Path("~root/.ssh").expanduser()  # where sshd looks, whatever HOME says


def why_no_hosts() -> str | None:
    """Why this machine cannot play several; None where it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [tool for tool in _TOOLS if shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None]
    if missing:
        return f"not installed: {', '.join(missing)} (iproute2, openssh-server, pdsh)"
    if subprocess.run(["unshare", "--net", "--mount", "--pid", "--fork", "true"], check=False).returncode:
        return "this machine does not let its processes make namespaces"
    return None


class Host:
    """One host of a :class:`Cluster`, up or down."""

    def __init__(self, name: str, address: str, folder: Path) -> None:
        self.name, self.address, self._folder = name, address, folder
        self._space = f"dynmoe-{os.getpid()}-{name}"
        self._boot: subprocess.Popen[bytes] | None = None

    def boot(self) -> None:
        """Starts the host's first process, whose end is the end of all others."""
        setup = f"""
            set -e
            hostname {self.name}
            mount -t tmpfs tmpfs /run && mkdir /run/sshd
            mount --bind {self._folder}/ssh {_SSH}
            mount --bind {self._folder}/hosts /etc/hosts
            $(command -v sshd) -f {self._folder}/sshd_config -E {self._folder}/sshd_{self.name}.log
            echo up
            while :; do sleep 1000; done"""
        self._boot = subprocess.Popen(
            ["ip", "netns", "exec", self._space, "unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child",
             "--mount-proc", "bash", "-c", setup], stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        assert self._boot.stdout is not None
        assert self._boot.stdout.readline() == b"up\n", f"{self.name} does not boot"

    def start(self, command: Sequence[str], output: Path, **environment: str) -> subprocess.Popen[bytes]:
        """A process on this host, in the project's directory."""
        assert self._boot is not None
        children = Path(f"/proc/{self._boot.pid}/task/{self._boot.pid}/children").read_text().split()
        with output.open("ab") as stream:
            return subprocess.Popen(
                ["nsenter", "--target", children[0], "--all", f"--wdns={Path(__file__).parents[2]}", *command],
                stdout=stream, stderr=subprocess.STDOUT, env=os.environ | environment, start_new_session=True,
            )  # fmt: skip

    def kill(self) -> None:
        """Ends every process of the host at once."""
        if self._boot is not None:
            os.killpg(self._boot.pid, signal.SIGKILL)
            self._boot.wait()
            self._boot = None


class Cluster:
    """Hosts alpha and beta, which reach each other over a network of their own, and by ssh without a password."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made_ssh = not _SSH.exists()
        self.hosts = [Host(name, f"{_NETWORK}.{number}", folder) for number, name in enumerate(("alpha", "beta"), 1)]

    def __enter__(self) -> list[Host]:
        ssh = self._folder / "ssh"
        ssh.mkdir(mode=0o700)
        for key in (ssh / "id_ed25519", self._folder / "host_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
        shutil.copy(ssh / "id_ed25519.pub", ssh / "authorized_keys")
        (ssh / "config").write_text("StrictHostKeyChecking no\nUserKnownHostsFile /dev/null\nLogLevel ERROR\n")
        (self._folder / "sshd_config").write_text(
            f"HostKey {self._folder}/host_key\nPidFile none\nUsePAM no\nPermitRootLogin yes\nStrictModes no\n"
        )
        names = [f"{host.address} {host.name}" for host in self.hosts]
        (self._folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *names, ""]))
        _SSH.mkdir(mode=0o700, exist_ok=True)
        spaces = [host._space for host in self.hosts]
        for space in spaces:
            subprocess.run(["ip", "netns", "add", space], check=True)
        ends = [["eth0", "netns", space] for space in spaces]
        subprocess.run(["ip", "link", "add", *ends[0], "type", "veth", "peer", "name", *ends[1]], check=True)
        for host, space in zip(self.hosts, spaces, strict=True):
            ip = ["ip", "-n", space]
            subprocess.run([*ip, "address", "add", f"{host.address}/24", "dev", "eth0"], check=True)
            for link in ("lo", "eth0"):
                subprocess.run([*ip, "link", "set", link, "up"], check=True)
            host.boot()
        return self.hosts

    def __exit__(self, *_: object) -> None:
        for host in self.hosts:
            host.kill()
            subprocess.run(["ip", "netns", "delete", host._space], check=False)
        if self._made_ssh:
            _SSH.rmdir()


def wait_until(condition: object, timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s} s"
        time.sleep(0.1)
