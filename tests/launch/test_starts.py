"""Checks before and after a start, failure records, and job scripts for Slurm."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dynmoe.cli import run_tool
from dynmoe.config import load_config
from dynmoe.data.pieces import UnreadableError
from dynmoe.errors import UserError
from dynmoe.launch import starts
from dynmoe.launch.slurm import Resources, job_script
from dynmoe.launch.starts import FAILED, FAILED_BY_USER, FINISHED, NO_PROGRESS, STOP_REQUESTED, after, begin
from dynmoe.launched import (
    FAILURES,
    address_towards,
    choose_interface,
    failure_to_repeat,
    read_failures,
    record_failure,
)
from dynmoe.train.run_directory import RunDirectory
from harness.processes import ROOT
from tests.train.cases import launch, read_rows, tiny


@pytest.fixture
def config(corpus_dir, tmp_path):
    return load_config(None, tiny(corpus_dir, tmp_path / "runs"))


@pytest.fixture
def rank(monkeypatch, tmp_path):
    """Sets the environment that a launcher gives to a rank."""

    def set_rank(number: int, attempt: int = 0) -> Path:
        environment = {"RANK": number, "WORLD_SIZE": 4, "MASTER_PORT": 1000 + attempt, FAILURES: tmp_path / "f"}
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))
        return tmp_path / "f"

    return set_rank


def test_a_vocabulary_that_is_too_small_is_refused_before_ranks_start(corpus_dir, tmp_path):
    config = load_config(None, [*tiny(corpus_dir, tmp_path / "runs"), "model.vocab_size=64"])
    with pytest.raises(
        UserError, match=r"model\.vocab_size=64: is smaller than the tokenizer's vocabulary; use at least"
    ):
        begin(config, 2, 0)


def test_a_checkpoint_that_this_host_cannot_read_stops_only_starts_that_must_adapt(
    config, corpus_dir, tmp_path, monkeypatch
):
    """Else the checks only describe the last start, and the ranks will say so."""

    def fail(path):
        raise UnreadableError.of(str(path), OSError(errno.ESTALE, "Stale file handle"))

    make_checkpoint(RunDirectory(config.run.path), 10)
    monkeypatch.setattr("dynmoe.launch.elastic.read_manifest", fail)
    assert begin(config, 2, 0).ranks == 2
    odd = load_config(None, [*tiny(corpus_dir, tmp_path / "runs"), "train.global_batch=8", "parallel.expert=1"])
    with pytest.raises(UserError, match=r"step_00000010 cannot be read on \S+ \(Stale file handle\); make it readable"):
        begin(odd, 3, 0)


def make_checkpoint(directory: RunDirectory, step: int) -> None:
    (directory.checkpoints / f"step_{step:08d}").mkdir(parents=True)


def test_a_start_is_recorded_and_the_previous_outcome_deleted(config):
    directory = begin(config, 2, 0).directory
    assert directory.path == config.run.path
    make_checkpoint(directory, 10)
    directory.write_outcome("preempted", 10)
    directory.failures.mkdir()
    (directory.failures / "rank_0.json").write_text("{}")
    begin(config, 2, 1)
    assert directory.outcome.exists(), "only the first node deletes it"
    again = begin(config, 2, 0).directory
    assert not again.outcome.exists()
    assert not again.failures.exists()
    assert [(row["step"], row["ranks"]) for row in read_rows(directory.starts(0))] == [(0, 2), (10, 2)]
    assert [row["step"] for row in read_rows(directory.starts(1))] == [10]
    assert after(directory, 2, node=1).status == FAILED, "a node counts its own starts"


@pytest.mark.parametrize(
    ("ranks", "field", "problem"),
    [
        (3, "train.steps=40", r"parallel\.expert=2: must divide the world size \(3\)"),
        (2, "train.global_batch=3", r"train\.global_batch=3: cannot be split evenly"),
        (2, "data.dirs=[nowhere]", "nowhere holds no prepared corpus"),
    ],
)
def test_what_cannot_run_is_refused_before_a_start_is_recorded(corpus_dir, tmp_path, ranks, field, problem):
    config = load_config(None, [*tiny(corpus_dir, tmp_path / "runs"), field])
    with pytest.raises(UserError, match=problem):
        begin(config, ranks, 0)
    assert not RunDirectory(config.run.path).starts(0).exists()
    begin(load_config(None, tiny(corpus_dir, tmp_path / "runs")), 2, 0)  # and the directory is free again


def test_a_running_job_is_left_alone(config):
    directory = begin(config, 2, 0).directory
    running = RunDirectory(directory.path)
    running.claim()
    running.write_outcome("preempted", 3)
    with pytest.raises(UserError, match="another job trains in"):
        begin(config, 2, 0, patience_s=0.2)
    assert running.outcome.exists()
    assert len(read_rows(running.starts(0))) == 1


def test_a_start_waits_for_the_lock_of_a_job_that_is_ending(config):
    holder = subprocess.Popen(
        [sys.executable, "-c", "import fcntl, sys, time\n"
         "lock = open(sys.argv[1], 'w'); fcntl.flock(lock, fcntl.LOCK_EX); print('held', flush=True); time.sleep(1)",
         str(begin(config, 2, 0).directory.path / ".lock")], stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout.readline() == "held\n"
    started = time.monotonic()
    begin(config, 2, 0)
    assert time.monotonic() - started > 0.3
    holder.wait()


def test_the_verdict_follows_from_the_files_of_a_start(config):
    directory = begin(config, 2, 0).directory
    assert after(directory, 3).status == FAILED
    begin(config, 2, 0)
    begin(config, 2, 0)
    verdict = after(directory, 3)
    assert verdict.status == NO_PROGRESS
    assert verdict.reason == "3 consecutive start(s) made no progress past step 0; not restarting"
    make_checkpoint(directory, 10)
    assert after(directory, 3).status == FAILED, "a newer checkpoint is progress"
    begin(config, 2, 0)
    assert after(directory, 1).status == NO_PROGRESS
    directory.write_outcome("preempted", 10)
    assert after(directory, 1).status == STOP_REQUESTED
    directory.write_outcome("finished", 40)
    assert after(directory, 1) == starts.Verdict(FINISHED, "finished at step 40")


def test_an_error_of_the_user_ends_the_launch(config, rank, monkeypatch):
    directory = begin(config, 2, 0).directory
    rank(1)
    monkeypatch.setenv(FAILURES, str(directory.failures))
    record_failure("data.dirs: gone", by_user=True)
    assert after(directory, 3).status == FAILED_BY_USER
    assert starts.describe_failures(directory).splitlines()[-1] == "error: data.dirs: gone"


def test_f28_the_first_failure_and_ranks_without_a_record_are_reported(config, rank, monkeypatch):
    directory = begin(config, 2, 0).directory
    for number, text in ((2, "Traceback\nOSError: disk"), (0, "Traceback\nConnection closed by peer")):
        rank(number)
        monkeypatch.setenv(FAILURES, str(directory.failures))
        record_failure(text, by_user=False)
        time.sleep(0.01)
    lines = starts.describe_failures(directory).splitlines()
    assert lines[0] == "rank(s) 1, 3 left no traceback: killed by a signal, or lost with their host"
    assert lines[1].startswith("first failure: rank 2 on ")
    assert lines[-1] == "OSError: disk"


def test_only_the_last_attempt_counts(rank):
    directory = rank(1, attempt=0)
    record_failure("of the first attempt", by_user=False)
    rank(0, attempt=1)
    record_failure("of the second", by_user=False)
    assert [failure["text"] for failure in read_failures(directory)] == ["of the second"]


def test_a_rank_does_not_repeat_an_error_of_the_user(rank, capsys):
    directory = rank(1, attempt=0)
    with pytest.raises(SystemExit):
        run_tool(lambda: (_ for _ in ()).throw(UserError("p=7: too large; use less")))
    assert [(failure["rank"], failure["by_user"]) for failure in read_failures(directory)] == [(1, True)]
    rank(0, attempt=1)
    assert failure_to_repeat() == "p=7: too large; use less"
    with pytest.raises(SystemExit) as ended:
        run_tool(lambda: pytest.fail("started again"))
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: p=7: too large; use less\n" * 2


def test_a_traceback_is_recorded_in_full(rank):
    directory = rank(3)
    with pytest.raises(ZeroDivisionError):
        run_tool(lambda: 1 / 0)
    (failure,) = read_failures(directory)
    assert failure["text"].startswith("Traceback (most recent call last):")
    assert failure["text"].endswith("ZeroDivisionError: division by zero")
    assert (failure["rank"], failure["ranks"], failure["by_user"]) == (3, 4, False)


def test_a_signal_during_the_shutdown_of_python_is_ignored():
    program = (
        "import atexit, os, signal\nfrom dynmoe.launched import StopSignal\n"
        "atexit.register(lambda: print(signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN))\nStopSignal()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == "True\n", done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signals_are_recorded_and_the_second_interrupt_ends_the_process(number):
    program = (
        "import os, signal, sys\nfrom dynmoe.launched import StopSignal\n"
        "stop = StopSignal()\nassert not stop.requested\n"
        f"os.kill(os.getpid(), {int(number)})\nassert stop.requested\nprint('noted', flush=True)\n"
        f"os.kill(os.getpid(), {int(signal.SIGINT)})\nprint('not reached')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == "noted\n"
    assert "KeyboardInterrupt" in done.stderr


def test_the_interface_is_the_one_that_reaches_the_first_rank(monkeypatch):
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    for name in names:
        monkeypatch.setenv(name, "to be restored")
        del os.environ[name]
    choose_interface()
    assert [os.environ[name] for name in names] == ["lo", "lo"]
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "mine")
    choose_interface()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "mine", "what the user sets stays"
    assert address_towards("127.0.0.1") == "127.0.0.1"
    del os.environ["NCCL_SOCKET_IFNAME"]
    monkeypatch.setenv("MASTER_ADDR", "no.such.host.invalid")
    choose_interface()
    assert "NCCL_SOCKET_IFNAME" not in os.environ


def script(config, *overrides: str, **options) -> str:
    given = {"nodes": 2, "gpus": 8, "ranks": 8, "time": "24:00:00", "grace_s": 300, "options": {}} | options
    return job_script(config, "my configs/it's.yaml", overrides, Resources(**given))


def test_a_job_script_requests_the_resources_and_quotes_names(tmp_path):
    config = load_config(ROOT / "configs" / "paper_3.5b.yaml")
    text = script(config, "run.dir=/a b/$HOME", options={"partition": "long", "account": "team-1"})
    for line in ("--nodes=2", "--gpus-per-node=8", "--time=24:00:00", "--signal=USR1@300", "--partition=long",
                 "--account=team-1", "--requeue"):  # fmt: skip
        assert f"#SBATCH {line}\n" in text
    (call,) = [line for line in text.splitlines() if line.startswith("set -- ")]
    assert shlex.split(call)[2:] == [str(Path("my configs/it's.yaml").resolve()), "run.dir=/a b/$HOME"]
    path = tmp_path / "job.sbatch"
    path.write_text(text)
    assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"nodes": 3}, r"train\.global_batch=256: cannot be split evenly"),
        ({"nodes": 0}, "--nodes 0, 8 ranks each: must both be at least 1"),
        ({"nodes": 2, "fewest": 3}, "--nodes 3-2: is not a range; write MIN-MAX"),
        ({"nodes": 2, "fewest": 0}, "--nodes 0-2: is not a range; write MIN-MAX"),
        ({"nodes": 3, "fewest": 1}, r"train\.global_batch=256: cannot be split evenly"),
        ({"nodes": 2, "fewest": 1, "gpus": 4, "ranks": 4}, r"parallel\.expert=8: the parallel sizes need at least 8"),
        ({"time": "a day"}, "--time a day: is not in Slurm's notation"),
        ({"grace_s": 0}, "--grace 0: Slurm accepts"),
        ({"time": "5"}, "--grace 300: is not below --time 5"),
        ({"time": "0-00:05"}, "--grace 300: is not below"),
        ({"options": {"partition": "a b"}}, "--partition 'a b': has characters that a job script cannot hold"),
    ],
)
def test_a_job_that_cannot_run_gets_no_script(options, problem):
    with pytest.raises(UserError, match=problem):
        script(load_config(ROOT / "configs" / "paper_3.5b.yaml"), **options)


def test_lists_of_hosts_and_constraints_reach_the_script():
    options = {"exclude": "node[03-05]", "constraint": "(a100|h100)&ib"}
    lines = script(load_config(ROOT / "configs" / "paper_3.5b.yaml"), options=options).splitlines()
    assert "#SBATCH --exclude=node[03-05]" in lines
    assert "#SBATCH --constraint=(a100|h100)&ib" in lines


def test_every_run_of_the_example_of_an_array_is_valid():
    text = (ROOT / "launch" / "slurm_array.sbatch").read_text()
    (path,) = re.findall(r"sbatch launch/slurm_array\.sbatch (\S+)", text)
    runs = re.findall(r"own=\((.*)\)", text)
    assert len(runs) == 3
    for fields in runs:
        load_config(ROOT / path, shlex.split(fields)).check_world(8)


def test_a_job_on_a_range_of_nodes_may_adapt_at_its_first_start():
    """Three nodes cannot share the batch, so two of them would train."""
    path = ROOT / "configs" / "paper_3.5b.yaml"
    text = script(load_config(path), nodes=4, fewest=1)
    assert "#SBATCH --nodes=1-4\n" in text
    (call,) = [line for line in text.splitlines() if line.startswith("set -- ")]
    assert shlex.split(call)[-1] == "parallel.elastic=always"
    assert "parallel.elastic" not in script(load_config(path), nodes=4, fewest=4)
    never = load_config(path, ["parallel.elastic=never"])
    assert "parallel.elastic" not in script(never, nodes=2, fewest=1)
    with pytest.raises(UserError, match=r"train\.global_batch=256: cannot be split evenly"):
        script(never, nodes=4, fewest=1)


def test_the_command_writes_a_script_and_refuses_in_one_line(tmp_path):
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "dynmoe.launch", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)

    output = tmp_path / "job.sbatch"
    given = ["slurm", "configs/nodes_4x8.yaml", "--gpus", "8", "--time", "1-00", "--output", str(output)]
    done = run(*given, "--nodes", "4", "run.name=long_run")
    assert done.returncode == 0, done.stderr
    assert "4 nodes with 8 ranks each" in done.stdout
    assert "#SBATCH --job-name=long_run" in output.read_text()
    assert "1-4 nodes with 8 ranks each" in run(*given, "--nodes", "1-4").stdout
    assert "'2-' is not a number or a range; write N or MIN-MAX, such as 1-4" in run(*given, "--nodes", "2-").stderr
    refused = run(*given, "--nodes", "3")
    assert refused.returncode == 2
    assert len(refused.stderr.splitlines()) == 1
    assert run("address", "127.0.0.1").stdout == "127.0.0.1\n"
    assert "MASTER_ADDR no.such.host.invalid" in run("address", "no.such.host.invalid").stderr


@pytest.mark.slow
def test_one_node_needs_only_the_script(corpus_dir, tmp_path):
    """launch/torchrun.sh as on a laptop: output by rank, the outcome, and the run directory."""
    fields = ["train.steps=4", "checkpoint.interval=0", "adaptation.interval=4", "adaptation.window=2"]
    done = launch(corpus_dir, tmp_path, *fields, MASTER_PORT="0")
    assert done.returncode == 0, done.stdout
    run = tmp_path / "runs" / "tiny"
    assert json.loads((run / "outcome.json").read_text())["status"] == "finished"
    assert "[0] step 4/4" in done.stdout
    assert len(list(run.glob("logs/node_0/*/attempt_0/*/stdout.log"))) == 2


@pytest.mark.slow
def test_a_stop_request_during_the_checks_ends_the_start(corpus_dir, tmp_path):
    python = tmp_path / "python"
    stop = '[[ "$*" == *"dynmoe.launch begin"* ]] && kill -TERM $PPID'
    python.write_text(f'#!/bin/bash\n{stop}\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    done = launch(corpus_dir, tmp_path, "train.steps=1000000", MASTER_PORT="0", PYTHON=str(python))
    assert done.returncode not in (0, FAILED_BY_USER), done.stdout
    assert "step 100/" not in done.stdout, "the run has trained"
