"""Jobs of launch/slurm.sbatch on a Slurm of two nodes: requeued where that helps, and with the same curve."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.processes import CPU, ROOT
from tests.cluster.hosts import wait_until
from tests.cluster.slurm import SlurmCluster, why_no_slurm
from tests.faults.test_elastic import SMOOTH, losses
from tests.faults.test_sample_order import samples
from tests.train.cases import TrainingProcess, curve, parameter_hashes, read_rows, tiny

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(why_no_slurm() is not None, reason=why_no_slurm() or ""),
]
# Names that a shell would take apart.
_FOLDER = "a 'strange' $HOME"
_LONGER = ["train.steps=1500", "logging.trace_interval=0", "logging.interval=20", "eval.interval=0",
           "checkpoint.interval=0", "logging.table_every=0"]  # fmt: skip


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with SlurmCluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


def _environment(**more: str) -> dict[str, str]:
    # Both nodes are this machine.
    return CPU | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "NPROC_PER_NODE": "1"} | more


def _write_script(folder: Path, *arguments: str, time: str, grace: int, nodes: str = "2") -> Path:
    config, script = folder / "tiny.yaml", folder / "job.sbatch"
    config.write_text("{}\n")
    subprocess.run(
        [sys.executable, "-m", "dynmoe.launch", "slurm", str(config), "--nodes", nodes, "--gpus", "0", "--time", time,
         "--grace", str(grace), "--output", str(script), *arguments], cwd=ROOT, check=True,
    )  # fmt: skip
    return script


def test_f05_a_job_over_both_nodes_goes_on_after_requeues_and_time_limits(slurm, corpus_dir, tmp_path):
    folder = tmp_path / _FOLDER
    folder.mkdir()
    run, output = folder / "runs" / "tiny", folder / "output"
    fields = [*tiny(corpus_dir, folder / "runs"), *_LONGER]
    script = _write_script(folder, *fields, "logging.wandb=offline", time="1", grace=15)
    job = slurm.submit(f"--output={output}", str(script), **_environment())
    wait_until(lambda: len(read_rows(run / "metrics.jsonl")) > 5, 120, "row of step 120")
    slurm.requeue(job)
    assert slurm.wait(job, 400) == "COMPLETED", output.read_text()

    reference = TrainingProcess(corpus_dir, tmp_path / "runs", *_LONGER)
    assert reference.wait(200) == 0, reference.output()
    assert curve(run / "metrics.jsonl") == curve(tmp_path / "runs" / "tiny" / "metrics.jsonl")
    assert parameter_hashes(run, 1500) == parameter_hashes(tmp_path / "runs" / "tiny", 1500)

    text = output.read_text()
    starts = [row["step"] for row in read_rows(run / "logs" / "starts_node_0.jsonl")]
    assert len(starts) >= 3, f"a requeue and a time limit at least: {text}"
    assert starts == sorted(set(starts)), "each start goes on from a checkpoint of its own"
    assert text.count("ended by Slurm") == 1
    assert text.count("; requeueing it") == len(starts) - 2
    assert text.count("stopped on request; rerun the same command to resume from step") == len(starts) - 2
    assert text.rstrip().endswith("finished at step 1500")
    assert {path.name for path in (run / "logs").glob("node_*")} == {"node_0", "node_1"}
    ids = [re.search(r"offline-run-\d+_\d+-(\w+)$", path.name)[1] for path in (run / "wandb").glob("offline-run-*")]
    assert len(ids) == len(starts)
    assert len(set(ids)) == 1, "one W&B run"


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("train.global_batch=3", "error: train.global_batch=3: cannot be split evenly"),
        ("model.router.p=7", "error: model.router.p=7"),
        ("data.dirs=[nowhere]", "error: data.dirs: nowhere holds no prepared corpus"),
    ],
)
def test_f05_what_fails_by_configuration_is_not_requeued(slurm, corpus_dir, tmp_path, field, message):
    output = tmp_path / "output"
    (tmp_path / "tiny.yaml").write_text("{}\n")
    options = ["--nodes=2", "--gpus-per-node=0", "--time=10", f"--output={output}", "launch/slurm.sbatch"]
    arguments = [str(tmp_path / "tiny.yaml"), *tiny(corpus_dir, tmp_path / "runs"), field]
    job = slurm.submit(*options, *arguments, **_environment())
    assert slurm.wait(job, 90) == "FAILED"
    assert slurm.facts(job)["Restarts"] == "0"
    assert slurm.facts(job)["ExitCode"] == "2:0"
    assert message in output.read_text()


def test_f05_a_run_that_gets_no_further_is_not_requeued_for_ever(slurm, corpus_dir, tmp_path):
    """Its checkpoints find no room."""
    output = tmp_path / "output"
    (tmp_path / "tiny.yaml").write_text("{}\n")
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    (tmp_path / "runs" / "tiny" / "checkpoints").write_text("a file in the way")
    options = ["--nodes=1", "--gpus-per-node=0", "--time=10", f"--output={output}", "launch/slurm.sbatch"]
    arguments = [str(tmp_path / "tiny.yaml"), *tiny(corpus_dir, tmp_path / "runs"), "parallel.expert=1"]
    job = slurm.submit(*options, *arguments, **_environment(MAX_RESTARTS="0", STARTS_WITHOUT_PROGRESS="2"))
    assert slurm.wait(job, 180) == "FAILED"
    assert slurm.facts(job)["Restarts"] == "1"
    text = output.read_text()
    assert "2 consecutive start(s) made no progress past step 0; not restarting" in text
    assert text.rstrip().splitlines()[-1].startswith("slurmstepd") or "Error: [Errno" in text


def test_f29_a_requeued_job_continues_on_the_nodes_that_are_left(slurm, corpus_dir, tmp_path):
    """Two nodes, one while the other is drained, and two again."""
    output = tmp_path / "output"
    run = tmp_path / "runs" / "tiny"
    fields = [*SMOOTH, "parallel.expert=1", "train.steps=100"]
    script = _write_script(tmp_path, *tiny(corpus_dir, tmp_path / "runs"), *fields, time="10", grace=15, nodes="1-2")
    job = slurm.submit(f"--output={output}", str(script), **_environment())

    def goes_on_with(nodes: str, restarts: int) -> None:
        rows = len(read_rows(run / "metrics.jsonl"))
        assert slurm.nodes_after_restart(job, restarts, 90) == nodes
        wait_until(lambda: len(read_rows(run / "metrics.jsonl")) > rows + 5, 90, "more rows")

    goes_on_with("2", restarts=0)
    slurm.drain("n2")
    try:
        slurm.requeue(job)
        goes_on_with("1", restarts=1)
    finally:
        slurm.restore("n2")
    slurm.requeue(job)
    goes_on_with("2", restarts=2)
    assert slurm.wait(job, 200) == "COMPLETED", output.read_text()
    text = output.read_text()
    assert f"{run}: continues on 1 rank(s) (before: 2): a step has 2 micro-batch(es) of 2\n" in text
    assert f"{run}: continues on 2 rank(s) (before: 1): a step has 1 micro-batch(es) of 2\n" in text

    whole = TrainingProcess(corpus_dir, tmp_path / "whole", *fields)
    assert whole.wait(200) == 0, whole.output()
    expected = losses(tmp_path / "whole" / "tiny")
    assert losses(run)[:60] == pytest.approx(expected[:60], rel=1e-5)
    assert losses(run) == pytest.approx(expected, rel=1e-3)  # by then, rounding moves tokens across thresholds
    assert samples(run, 100) == samples(tmp_path / "whole" / "tiny", 100)


def test_f29_nodes_that_the_layout_cannot_use_stay_idle(slurm, corpus_dir, tmp_path):
    """Three sequences of a step cannot be shared by the two nodes of the second job."""
    run = tmp_path / "runs" / "tiny"
    (tmp_path / "tiny.yaml").write_text("{}\n")
    fields = [*SMOOTH, "parallel.expert=1", "train.global_batch=3", "train.micro_batch=3"]
    for nodes, steps in (("1", 10), ("2", 20)):
        output = tmp_path / f"output_{nodes}"
        options = [f"--nodes={nodes}", "--gpus-per-node=0", "--time=10", f"--output={output}", "launch/slurm.sbatch"]
        arguments = [str(tmp_path / "tiny.yaml"), *tiny(corpus_dir, tmp_path / "runs"), *fields, f"train.steps={steps}"]
        job = slurm.submit(*options, *arguments, **_environment())
        assert slurm.wait(job, 180) == "COMPLETED", output.read_text()
    text = output.read_text()
    assert f"{run}: continues on 1 of 2 rank(s): a step has 1 micro-batch(es) of 3, as train.global_batch=3: " in text
    assert f"job {job}: these nodes stay idle: n2\n" in text
    assert samples(run, 20)[-1][-1][0] == 59


def test_an_array_trains_several_runs(slurm, corpus_dir, tmp_path):
    (tmp_path / "tiny.yaml").write_text("{}\n")
    theirs = ("run.name", "model.router", "budget", "adaptation", "parallel", "model.moe.active")
    fields = [field for field in tiny(corpus_dir, tmp_path / "runs") if not field.startswith(theirs)]
    options = ["--gpus-per-node=0", "--time=10", f"--output={tmp_path}/output-%a", "launch/slurm_array.sbatch"]
    job = slurm.submit(*options, str(tmp_path / "tiny.yaml"), *fields, **_environment())
    for task in range(3):
        assert slurm.wait(f"{job}_{task}", 180) == "COMPLETED", (tmp_path / f"output-{task}").read_text()
    for name in ("router_top_k", "router_top_p", "router_top_any"):
        assert json.loads((tmp_path / "runs" / name / "outcome.json").read_text())["status"] == "finished"
