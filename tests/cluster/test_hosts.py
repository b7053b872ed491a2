"""launch/torchrun.sh and launch/deepspeed.sh across two hosts: training, a host that dies, one that never comes."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.processes import CPU
from tests.cluster.hosts import Cluster, Host, wait_until, why_no_hosts
from tests.faults.test_elastic import SMOOTH, losses
from tests.faults.test_sample_order import samples
from tests.train.cases import TrainingProcess, curve, parameter_hashes, read_rows, tiny

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(why_no_hosts() is not None, reason=why_no_hosts() or ""),
]
_ENVIRONMENT = CPU | {"OMP_NUM_THREADS": "1", "NNODES": "2", "NPROC_PER_NODE": "1", "MASTER_ADDR": "10.87.0.1"}


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[list[Host]]:
    (tmp_path / "hosts").mkdir()
    with Cluster(tmp_path / "hosts") as hosts:
        yield hosts


@pytest.fixture
def job(corpus_dir: Path, tmp_path: Path) -> Job:
    return Job(corpus_dir, tmp_path)


class Job:
    """The tiny run, started on hosts in either way."""

    def __init__(self, corpus: Path, folder: Path) -> None:
        self.folder, self.run = folder, folder / "runs" / "tiny"
        self.config = folder / "tiny.yaml"
        self.config.write_text("{}\n")
        self.arguments = [str(self.config), *tiny(corpus, folder / "runs")]
        self.hostfile = folder / "hostfile"
        self.hostfile.write_text("alpha slots=1\nbeta slots=1\n")

    def torchrun(self, host: Host, **environment: str):
        number = "0" if host.name == "alpha" else "1"
        given = _ENVIRONMENT | {"NODE_RANK": number, "HOSTS": "alpha beta", "LIMIT": ":"} | environment
        command = ["bash", "-c", '$LIMIT; exec launch/torchrun.sh "$@"', "torchrun", *self.arguments]
        return host.start(command, self.output(host), **given)

    def deepspeed(self, host: Host, **environment: str):
        command = ["launch/deepspeed.sh", str(self.hostfile), *self.arguments]
        return host.start(command, self.output(host), DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", **environment)

    def output(self, host: Host) -> Path:
        return self.folder / f"{host.name}.txt"

    def wait_for_row(self, step: int) -> None:
        metrics = self.run / "metrics.jsonl"
        wait_until(lambda: any(row["train/step"] >= step for row in read_rows(metrics)), 120, f"step {step}")

    def is_the_undisturbed(self, reference: Path) -> None:
        assert curve(self.run / "metrics.jsonl") == curve(reference / "metrics.jsonl")
        assert parameter_hashes(self.run, 40) == parameter_hashes(reference, 40)

    def starts(self) -> list[int]:
        """Steps from which the run was started."""
        return [row["step"] for row in read_rows(self.run / "logs" / "starts_node_0.jsonl")]


@pytest.mark.parametrize("victim", ["beta", "alpha, which holds the rendezvous"])
def test_torchrun_goes_on_from_the_checkpoint_after_a_host_died(hosts, job, undisturbed, victim):
    alpha, beta = hosts
    dying = beta if victim == "beta" else alpha
    processes = {host.name: job.torchrun(host) for host in hosts}
    job.wait_for_row(13)
    dying.kill()
    processes[dying.name].wait(10)
    dying.boot()
    processes[dying.name] = job.torchrun(dying)
    for host in hosts:
        assert processes[host.name].wait(180) == 0, job.output(host).read_text()
    job.is_the_undisturbed(undisturbed[0])
    assert job.starts() == ([0] if victim == "beta" else [0, 10])
    logs = [path.parent.name for path in job.run.glob("logs/node_*/*/attempt_*/*/stdout.log")]
    assert len(logs) >= 3, "each attempt has output of its own"


def test_deepspeed_goes_on_from_the_checkpoint_after_a_host_died(hosts, job, undisturbed):
    alpha, beta = hosts
    process = job.deepspeed(alpha)
    job.wait_for_row(13)
    beta.kill()
    time.sleep(3)
    beta.boot()
    assert process.wait(180) == 0, job.output(alpha).read_text()
    job.is_the_undisturbed(undisturbed[0])
    assert job.starts() == [0, 10]
    assert "finished at step 40" in job.output(alpha).read_text()


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_f29_a_run_continues_on_more_hosts_and_fewer_of_their_ranks(hosts, job, corpus_dir, tmp_path, launcher):
    """Two ranks of one host, then three of the four of two hosts, as four cannot share six sequences."""
    fields = [*SMOOTH, "parallel.expert=1", "train.global_batch=6", "train.micro_batch=3"]
    arguments = [*job.arguments, *fields]
    for count, steps in ((1, 10), (2, 40)):
        job.arguments = [*arguments, f"train.steps={steps}"]
        job.hostfile.write_text("\n".join([f"{host.name} slots=2" for host in hosts[:count]]))
        environment = {"NNODES": str(count), "NPROC_PER_NODE": "2"}
        starting = hosts[:count] if launcher == "torchrun" else hosts[:1]
        processes = [getattr(job, launcher)(host, **environment) for host in starting]
        for process in processes:
            assert process.wait(240) == 0, job.output(hosts[0]).read_text()
    text = job.output(hosts[0]).read_text()
    assert (
        "continues on 3 of 4 rank(s) (before: 2): a step has 1 micro-batch(es) of 2, as train.global_batch=6: " in text
    )
    if launcher == "deepspeed":
        assert "the other GPUs stay idle; in use: alpha:0,1@beta:0" in text
    whole = TrainingProcess(corpus_dir, tmp_path / "whole", *fields)
    assert whole.wait(200) == 0, whole.output()
    assert losses(job.run) == pytest.approx(losses(tmp_path / "whole" / "tiny"), rel=1e-5)
    assert samples(job.run) == samples(tmp_path / "whole" / "tiny")


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_a_script_that_is_told_to_end_saves_first(hosts, job, undisturbed, launcher):
    alpha, _ = hosts
    processes = [job.torchrun(host) for host in hosts] if launcher == "torchrun" else [job.deepspeed(alpha)]
    job.wait_for_row(5)
    for process in processes:
        (script,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(script), signal.SIGTERM)
    for process in processes:
        assert process.wait(90) == 75, job.output(alpha).read_text()
    outcome = json.loads((job.run / "outcome.json").read_text())
    assert outcome["status"] == "preempted"
    assert "stopped on request; rerun the same command to resume from step" in job.output(alpha).read_text()
    again = job.deepspeed(alpha)
    assert again.wait(120) == 0
    job.is_the_undisturbed(undisturbed[0])
    assert job.starts() == [0, outcome["step"]]


def test_torchrun_names_the_host_that_never_comes(hosts, job):
    started = time.monotonic()
    process = job.torchrun(hosts[0], JOIN_TIMEOUT_S="10", RELAUNCH="0")
    assert process.wait(60) != 0
    assert time.monotonic() - started < 40
    output = job.output(hosts[0]).read_text()
    assert "error: node 1 (beta) did not join within 10 s; run this command on it" in output
    assert "node 0" not in output


def test_deepspeed_names_the_host_that_never_comes(hosts, job):
    alpha, beta = hosts
    beta.kill()
    process = job.deepspeed(alpha, JOIN_TIMEOUT_S="6")
    assert process.wait(60) == 2
    last = job.output(alpha).read_text().splitlines()[-1]
    assert last.startswith("error: host beta of ")
    assert "does not answer over ssh (ssh: connect to host beta port 22" in last
    assert not job.run.exists()


def test_f28_a_run_without_progress_ends_with_the_traceback_of_the_first_failing_rank(hosts, job):
    """The second host cannot import what trains; the first, which waits for it, is told that it has given up."""
    alpha, beta = hosts
    (job.folder / "deepspeed.py").write_text('raise ImportError("libcudart.so.13: no such file")\n')
    processes = [job.torchrun(alpha, MAX_RESTARTS="0"), job.torchrun(beta, MAX_RESTARTS="0", PYTHONPATH=job.folder)]
    assert [process.wait(120) for process in processes] == [3, 3]
    for host in hosts:
        lines = job.output(host).read_text().splitlines()
        assert lines[-1] == "ImportError: libcudart.so.13: no such file"
        first = [line for line in lines if line.startswith("first failure: rank ")]
        assert first
        assert all("on beta; output of all ranks: " in line for line in first)
    assert "3 consecutive start(s) made no progress past step 0; not restarting" in job.output(beta).read_text()


def test_f06_a_host_whose_disk_is_full_ends_the_run_with_one_line(hosts, job):
    """The second host cannot write files as large as a checkpoint's; another start would not help."""
    alpha, beta = hosts
    processes = [job.torchrun(alpha, MAX_RESTARTS="0"), job.torchrun(beta, MAX_RESTARTS="0", LIMIT="ulimit -f 100")]
    assert [process.wait(120) for process in processes] == [2, 2]
    for host in hosts:
        last = job.output(host).read_text().splitlines()[-1]
        assert last.startswith(f"error: checkpoint {job.run.resolve()}/checkpoints/step_00000010.tmp-")
        assert "File too large (os error 27)); free disk space or fix the permissions, and restart" in last
    assert job.starts() == [0]


def test_what_a_configuration_cannot_do_is_not_tried_twice(hosts, job):
    job.arguments.append("train.global_batch=3")
    process = job.deepspeed(hosts[0])
    assert process.wait(60) == 2
    assert job.output(hosts[0]).read_text().splitlines()[-1].startswith("error: train.global_batch=3: cannot be split")
    assert job.starts() == [], "no rank was started"
