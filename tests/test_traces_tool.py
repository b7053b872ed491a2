"""Traces in the layout of FLAME-MoE, against a writer and analyses that follow its documented files and its code."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from dynmoe.errors import UserError
from dynmoe.traces import from_flame, main, to_flame
from harness.processes import ROOT
from tests.engines.routing_cases import train_and_trace

EXPERTS = 8
LENGTH = 4
PLACE = ["step", "layer", "sample", "position"]
WHOLE = ["train.micro_batch=4", "model.layers=2", f"model.moe.experts={EXPERTS}"]


def write_flame(folder: Path, k: int, iterations: tuple[int, ...], fixed: bool) -> dict[tuple[int, int], torch.Tensor]:
    """Files by the dataset's card, of probabilities captured as moe_layer.py does; returns the probabilities.

    Tokens are in two files, of which each has several row groups.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(50277, (6 * LENGTH,), generator=generator)
    (folder / "samples").mkdir(parents=True)
    for number, part in enumerate(tokens.split(4 * LENGTH)):
        table = pa.table({"token_id": pa.array(part.tolist(), pa.int32())})
        pq.write_table(table, folder / "samples" / f"{number:03d}.parquet", row_group_size=5)
    probs = {}
    for iteration in iterations:
        for layer in (2, 3):
            probs_TE = torch.randn(len(tokens), EXPERTS, generator=generator).softmax(dim=1)
            values, indices = torch.topk(probs_TE, k=k)
            size = k if fixed else -1
            table = pa.table({
                "scores": pa.array(values.half().numpy().tolist(), pa.list_(pa.float16(), size)),
                "indices": pa.array(indices.tolist(), pa.list_(pa.int16(), size)),
            })  # fmt: skip
            target = folder / "actives" / f"iter_{iteration:04d}" / f"layer_{layer:02d}.parquet"
            target.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(table, target, row_group_size=7)
            probs[iteration, layer] = probs_TE
    return probs


@pytest.mark.parametrize("fixed", [True, False])
def test_traces_of_flame_moe_are_read(tmp_path, monkeypatch, fixed):
    monkeypatch.setattr("dynmoe.traces._ROWS", 9)
    probs = write_flame(tmp_path / "flame", 3, (540, 11029), fixed)
    assert from_flame(tmp_path / "flame", tmp_path / "traces", LENGTH) == [540, 11029]
    trace = pd.read_parquet(tmp_path / "traces").sort_values(PLACE, ignore_index=True)
    tokens = pd.read_parquet(tmp_path / "flame" / "samples")["token_id"]
    assert len(trace) == 2 * 2 * len(tokens)
    for row in trace.itertuples():
        token = row.sample * LENGTH + row.position
        assert row.token == tokens[token]
        probs_E = probs[row.step, row.layer + 1][token]  # Megatron counts layers from 1
        chosen = sorted(range(EXPERTS), key=lambda e, probs_E=probs_E: -float(probs_E[e]))[:3]
        assert list(row.experts) == sorted(chosen)
        assert list(row.gates) == [float(probs_E[e].half()) for e in sorted(chosen)]
        assert list(row.dropped) == []


def test_read_traces_have_the_schema_of_ours(one_rank, tmp_path):
    write_flame(tmp_path / "flame", 2, (1,), fixed=True)
    from_flame(tmp_path / "flame", tmp_path / "read", LENGTH)
    one_rank.run(train_and_trace, WHOLE, 1, str(tmp_path / "own"))
    read, own = (pq.read_schema(next((tmp_path / name).rglob("*.parquet"))) for name in ("read", "own"))
    assert read.equals(own)


@pytest.fixture(scope="module")
def traced(two_ranks, tmp_path_factory):
    """Traces of two ranks: of a router with a fixed number of experts, and of one without; by kind."""
    made = {}
    for kind, fields in (("top_k", ["model.router.k=3"]), ("top_p", ["model.router.p=0.3"])):
        folder = tmp_path_factory.mktemp("traced") / kind
        two_ranks.run(
            train_and_trace, [*WHOLE, f"model.router.kind={kind}", *fields, "parallel.expert=2"], 2, str(folder)
        )
        made[kind] = folder
    return made


@pytest.mark.parametrize("kind", ["top_k", "top_p"])
def test_written_traces_are_read_as_their_card_and_their_analyses_do(traced, tmp_path, kind):
    """The card's quick start, co-activation (expert_coactivation_step2.py), saturation (router_saturation_step2.py)."""
    assert to_flame(traced[kind], tmp_path / "flame", step=2) == [2]
    own = pd.read_parquet(traced[kind] / "step_00000002").sort_values(PLACE, ignore_index=True)
    samples = pq.read_table(tmp_path / "flame" / "samples" / "000.parquet")
    assert samples.schema.field("token_id").type == pa.int32()
    assert [path.name for path in (tmp_path / "flame" / "actives").iterdir()] == ["iter_0002"]
    names = sorted(path.name for path in (tmp_path / "flame" / "actives" / "iter_0002").iterdir())
    assert names == ["layer_01.parquet", "layer_02.parquet"]
    for layer in (0, 1):
        rows = own[own["layer"] == layer].reset_index(drop=True)
        actives = pq.read_table(tmp_path / "flame" / "actives" / "iter_0002" / f"layer_{layer + 1:02d}.parquet")
        fixed = kind == "top_k"
        assert actives.schema.field("scores").type == pa.list_(pa.float16(), 3 if fixed else -1)
        assert actives.schema.field("indices").type == pa.list_(pa.int16(), 3 if fixed else -1)
        assert actives.num_rows == samples.num_rows == len(rows)
        together = np.zeros((EXPERTS, EXPERTS))
        for number, row in enumerate(rows.itertuples()):
            indices = actives.slice(number, 1).column("indices")[0].as_py()
            scores = actives.slice(number, 1).column("scores")[0].as_py()
            assert samples.column("token_id")[number].as_py() == row.token
            assert sorted(scores, reverse=True) == scores
            gate_of = dict(zip(row.experts, row.gates, strict=True))
            assert sorted(indices) == list(row.experts)
            assert scores == [float(np.float16(gate_of[expert])) for expert in indices]
            for i in indices:
                for j in indices:
                    together[i][j] += 1.0
        counts = rows["experts"].explode().value_counts()
        assert [together[e][e] for e in range(EXPERTS)] == [counts.get(e, 0) for e in range(EXPERTS)]
        if fixed:
            matrix = np.array(actives.column("indices").to_pylist())[:, :3]
            assert all(np.isin(a, b, assume_unique=True).sum() == 3 for a, b in zip(matrix, matrix, strict=True))
        else:
            assert rows["experts"].str.len().nunique() > 1


def test_there_and_back(traced, tmp_path):
    """Only the numbers of the samples, the precision of gates and dropped routes are lost."""
    to_flame(traced["top_p"], tmp_path / "flame", step=1)
    from_flame(tmp_path / "flame", tmp_path / "back", 24)
    own, back = (
        pd.read_parquet(path).sort_values(PLACE, ignore_index=True)
        for path in (traced["top_p"] / "step_00000001", tmp_path / "back")
    )
    pd.testing.assert_frame_equal(back.drop(columns="gates"), own.drop(columns="gates"))
    for ours, theirs in zip(back["gates"], own["gates"], strict=True):
        assert (ours == theirs.astype("float16")).all()


def test_steps_with_other_tokens_are_not_written_together(traced, tmp_path):
    with pytest.raises(UserError) as caught:
        to_flame(traced["top_k"], tmp_path / "flame")
    assert str(caught.value) == (
        f"{traced['top_k'] / 'step_00000002'}: layer 0 has other tokens than before, but the layout has one set of "
        "tokens for all; convert one step with --step"
    )
    with pytest.raises(UserError, match=r"has no trace of step 9; name a run or step that was traced"):
        to_flame(traced["top_k"], tmp_path / "flame", step=9)


def broken(folder: Path, name: str) -> None:
    file = folder / "actives" / "iter_0001" / "layer_03.parquet"
    table = pq.read_table(file)
    if name == "rows":
        pq.write_table(table.slice(1), file)
    elif name == "column":
        pq.write_table(table.drop_columns("scores"), file)
    elif name == "damaged":
        file.write_bytes(file.read_bytes()[:-9])
    elif name == "padding":
        rows = [[-1, 1], *table["indices"].to_pylist()[1:]]
        indices = pa.array(rows, pa.list_(pa.int16()))
        pq.write_table(table.set_column(1, "indices", indices), file)
    elif name == "lengths":
        indices = pa.array([[1], *table["indices"].to_pylist()[1:]], pa.list_(pa.int16()))
        pq.write_table(table.set_column(1, "indices", indices), file)
    elif name == "samples":
        for own in (folder / "samples").iterdir():
            own.unlink()


BROKEN = {
    "rows": r"layer_03\.parquet: has 23 rows for 24 tokens; download the samples and actives of the same model",
    "column": r"layer_03\.parquet: is not a file of FLAME-MoE traces \(no column scores\); download it again",
    "damaged": r"layer_03\.parquet: is not a file of FLAME-MoE traces \(.*\); download it again",
    "padding": r"layer_03\.parquet: has index -1, which is no expert; remove padding from the rows",
    "lengths": r"layer_03\.parquet: has rows with more scores than indices or fewer; download the file again",
    "samples": r"samples: has no N\.parquet; name a directory with samples and actives of a FLAME-MoE model",
}


@pytest.mark.parametrize("name", BROKEN)
def test_files_that_do_not_fit_are_refused_in_one_line(tmp_path, name):
    write_flame(tmp_path / "flame", 2, (1,), fixed=False)
    broken(tmp_path / "flame", name)
    with pytest.raises(UserError, match=f"^{re.escape(str(tmp_path))}.*{BROKEN[name]}$"):
        from_flame(tmp_path / "flame", tmp_path / "traces", LENGTH)


def test_the_command(traced, tmp_path, monkeypatch):
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "dynmoe.traces", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=60)

    out = tmp_path / "made" / "flame"
    done = run(str(traced["top_k"]), str(out), "--to", "flame", "--step", "1")
    assert (done.returncode, done.stdout) == (0, f"{out}: step 1 in the layout of flame\n"), done.stderr
    back = tmp_path / "made" / "back"
    monkeypatch.setattr(sys, "argv", ["traces", str(out), str(back), "--to", "dynmoe", "--sequence-length", "7"])
    with pytest.raises(UserError, match=r"--sequence-length=7: does not divide the 192 tokens; use a divisor"):
        main()
    assert [path.name for path in out.parent.iterdir()] == ["flame"], "a failed conversion leaves nothing behind"
    for length, message in (("0", "is too small; use at least 1"), ("24", "exists; name a new directory")):
        target = back if length == "0" else out
        monkeypatch.setattr(
            sys, "argv", ["traces", str(out), str(target), "--to", "dynmoe", "--sequence-length", length]
        )
        with pytest.raises(UserError, match=message):
            main()
    for arguments, message in (
        (
            [str(traced["top_k"]), str(back), "--to", "dynmoe", "--step", "1"],
            "--step=1: has no meaning for --to dynmoe",
        ),
        ([str(cut_short(traced["top_k"], tmp_path)), str(back), "--to", "flame"], "cannot be read as a trace"),
    ):
        monkeypatch.setattr(sys, "argv", ["traces", *arguments])
        with pytest.raises(UserError, match=message):
            main()


def cut_short(traces: Path, folder: Path) -> Path:
    """A copy of traces whose first file is cut short."""
    copy = folder / "broken"
    shutil.copytree(traces, copy)
    file = sorted(copy.rglob("*.parquet"))[0]
    file.write_bytes(file.read_bytes()[:50])
    return copy
