"""The GPU day keeps its time, whatever its parts do, and loses nothing that they measured."""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from bench import gpu_day, gpu_kernels, gpu_parts
from bench.__main__ import main
from bench.gpu_layer import Case
from bench.timing import waits
from dynmoe.errors import UserError
from dynmoe.ops.triton.backend import _ROW_TILES, choose_tiles
from harness.processes import is_running
from tests.test_bench import run_benchmark

GOOD = {"case": "fine", "dtype": "bfloat16", "limit": 0.02, "spare_rows_equal": True} | dict.fromkeys(
    ("y", "x", "gates", "w_up", "w_down"), 0.004
)
# What the process of a part does, given the file for its rows.
DOES = {
    "right": f"rows.write({json.dumps(json.dumps(GOOD))} + '\\n')",
    "wrong": f"rows.write({json.dumps(json.dumps(GOOD | {'x': 0.5}))} + '\\n')",
    "fails": "rows.write('{\"a\": 1}\\n'); rows.flush(); print('out of memory'); sys.exit(3)",
    "dies": "print('illegal address', flush=True); os.kill(os.getpid(), 6)",
    "cannot": f"print('is not installed'); sys.exit({gpu_parts.SKIPPED})",
    "hangs": "rows.write('{\"a\": 1}\\n{\"a\": '); rows.flush()\n"
    "print(subprocess.Popen(['sleep', '60']).pid, flush=True); time.sleep(60)",
}  # fmt: skip


@pytest.fixture
def day(monkeypatch, tmp_path):
    """Runs a day whose parts do the given things, and looks into the JSON before each of them."""
    seen: list[list[str]] = []
    path = tmp_path / "day.json"

    def run(minutes: float = 1.0, **does: str):
        def command(name: str, rows: Path, seconds: float) -> list[str]:
            seen.append([row["part"] for row in json.loads(path.read_text())["rows"]] if path.exists() else [])
            begin = "import os, subprocess, sys, time\nrows = open(sys.argv[1], 'a')\n"
            return [sys.executable, "-c", begin + DOES[does[name]], str(rows)]

        parts = [gpu_day.Part(name, 1, decides=name == "kernels") for name in does]
        monkeypatch.setattr(gpu_day, "PARTS", parts)
        monkeypatch.setattr(gpu_day, "command", command)
        given = argparse.Namespace(minutes=minutes, parts=list(does), json=path)
        return gpu_day.run(given), path, seen

    return run


def test_a_part_that_hangs_is_stopped_with_all_it_started_and_the_others_run(day):
    start = time.monotonic()
    rows, path, _ = day(8 / 60, kernels="right", layer="hangs", grid="right")
    assert time.monotonic() - start < 30  # not 60; a busy machine starts processes late
    assert [row["outcome"] for row in rows] == ["done", "stopped", "done"]
    assert rows[1]["rows"] == [{"a": 1}]  # but not the half line
    assert not is_running(int(rows[1]["last_line"]))
    assert json.loads(path.read_text())["rows"] == rows
    assert gpu_day.failures(rows) == []


def test_time_that_a_part_leaves_is_for_the_later_ones(day):
    _, path, _ = day(2.0, kernels="right", layer="right", grid="right")
    limits = [int(line.split()[-2]) for line in path.with_suffix(".log").read_text().splitlines() if "at most" in line]
    assert limits[0] == 40
    assert 50 <= limits[1] <= 60
    assert 90 <= limits[2] <= 120


def test_the_json_is_written_after_each_part(day):
    _, _, seen = day(kernels="right", layer="fails", grid="right")
    assert seen == [[], ["kernels"], ["kernels", "layer"]]


def test_a_part_that_fails_is_reported_with_its_rows_and_its_last_line(day):
    rows, path, _ = day(kernels="right", layer="fails", grid="dies", sonic="cannot")
    assert [row["outcome"] for row in rows] == ["done", "failed with status 3", "failed with status -6", "skipped"]
    assert rows[1]["rows"] == [{"a": 1}]
    assert [row.get("last_line") for row in rows] == [None, "out of memory", "illegal address", "is not installed"]
    assert "illegal address" in path.with_suffix(".log").read_text()
    assert gpu_day.failures(rows) == ["layer failed with status 3", "grid failed with status -6"]


def test_without_time_left_a_part_is_stopped_at_once(day):
    rows, _, _ = day(0.0, kernels="hangs", layer="hangs")
    assert [row["outcome"] for row in rows] == ["stopped", "stopped"]
    assert gpu_day.failures(rows) == ["kernels stopped"]


def test_a_wrong_kernel_makes_the_status_of_the_day(day, monkeypatch, capsys, tmp_path):
    _, path, _ = day(kernels="right")  # sets the parts
    for does, fails in (("right", False), ("wrong", True)):
        monkeypatch.setitem(DOES, "now", DOES[does])
        day(kernels="now")
        monkeypatch.setattr(sys, "argv", ["bench", "gpu_day", "--json", str(path), "--parts", "kernels"])
        if fails:
            with pytest.raises(UserError, match=r"bench gpu_day: kernels, fine, bfloat16: x off by more than 0.02"):
                main()
        else:
            main()
        assert json.loads(path.read_text())["rows"][0]["rows"][0]["x"] == (0.5 if fails else 0.004)
    assert (
        "kernels that differ from a loop, by cases and dtypes: 1.000, target at most 0: missed"
        in capsys.readouterr().out
    )


def test_failures_of_kernels_are_told_by_case():
    broken = {key: GOOD[key] for key in ("case", "dtype", "limit")} | {"problem": "out of resource: shared memory"}
    unequal = GOOD | {"spare_rows_equal": False}
    nan = GOOD | {"gates": float("nan")}
    assert gpu_kernels.failures([GOOD, broken, unequal, nan]) == [
        "kernels, fine, bfloat16: out of resource: shared memory",
        "kernels, fine, bfloat16: rows that are not in use change the result",
        "kernels, fine, bfloat16: gates off by more than 0.02",
    ]


def test_the_day_has_a_section_with_a_table_for_each_part(day, tmp_path, monkeypatch):
    _, path, _ = day(kernels="right", tiles="fails")
    (tmp_path / "gpu_day.json").write_text(path.read_text())
    page = tmp_path / "page.md"
    monkeypatch.setattr(sys, "argv", ["bench", "all", "--only", "--page", str(page), "--figures", str(tmp_path)])
    main()
    text = page.read_text()
    assert "## A day with a GPU: " in text
    assert "| tiles | failed with status 3 |" in text
    assert text.index("### kernels") < text.index("| fine | bfloat16 |") < text.index("### tiles")


def test_a_part_writes_each_row_as_it_is_measured(monkeypatch, tmp_path):
    path = tmp_path / "rows.jsonl"

    def rows(seconds: float):
        yield {"seconds": seconds}
        assert json.loads(path.read_text()) == {"seconds": 5.0}
        yield {"a": 2}

    monkeypatch.setitem(gpu_parts.PARTS, "layer", rows)
    monkeypatch.setattr(sys, "argv", ["gpu_parts", "layer", "--rows", str(path), "--seconds", "5"])
    gpu_parts.main()
    assert len(path.read_text().splitlines()) == 2


def test_every_part_has_its_function():
    assert [part.name for part in gpu_day.PARTS] == list(gpu_parts.PARTS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="without a GPU")
def test_nothing_waits_for_a_gpu_that_is_not_there():
    done: list[int] = []
    assert waits(lambda: done.append(1)) == 0
    assert done == [1]


def test_waits_are_counted_but_not_the_notice_about_counting(monkeypatch):
    """With the warnings of torch 2.11 to 2.13."""
    modes: list[str] = []

    def set_mode(mode: str) -> None:
        modes.append(mode)
        warnings.warn("Synchronization debug mode does not yet detect all synchronizing operations", stacklevel=2)

    def step() -> None:
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=2)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    assert waits(step) == 3
    assert modes == ["warn", "default"]


def test_the_tile_search_keeps_the_fastest_and_restores_what_it_found(monkeypatch):
    """With a clock that prefers narrow tiles of the up projection, of which the narrowest do not compile."""
    from bench import gpu_tiles
    from dynmoe.ops.triton import backend as kernels

    monkeypatch.setattr(gpu_tiles, "_SIZES", {"columns": (32, 64, 128)})
    original = kernels.choose_tiles

    def timed() -> float:
        columns = kernels.choose_tiles("up", 10**6, 4, torch.bfloat16, 90).columns
        if columns == 32:
            raise RuntimeError("out of resource: shared memory\nmore")
        return float(columns)

    with gpu_tiles._settings() as (settings, chosen):
        timed()
        row = gpu_tiles._descend("up", chosen["up"], settings, timed, time.monotonic() + 60)
        assert settings["up"].columns == 64
    assert kernels.choose_tiles is original
    assert row["over_chosen"] == 64 / 128
    assert row["tried"] == 3


@pytest.mark.slow
def test_a_rehearsal_runs_every_part(tmp_path):
    rows, said = run_benchmark(tmp_path, "gpu_day", "--minutes", "9", timeout_s=600)
    assert [row["outcome"] for row in rows] == ["done"] * 7, said
    measured = {row["part"]: row["measured"] for row in rows}
    assert measured == {"kernels": 4, "layer": 2, "engines": 2, "grid": 2, "tiles": 4, "sonic": 2, "mxfp8": 2}
    assert "kernels that differ from a loop, by cases and dtypes: 0.000, target at most 0: reached" in said
    assert "waits for the GPU: 0.000, target at most 0: reached" in said


def test_a_case_is_shrunk_but_keeps_its_routing():
    case = Case(32768, 2048, 1408, 64, 6.0).shrunk(256)
    assert (case.tokens, case.hidden, case.width, case.experts, case.mean_k) == (128, 8, 8, 64, 6.0)


def test_the_kernels_are_compared_at_every_height_of_a_tile():
    cases = [case for case in gpu_kernels._CASES if case.holes < 2]
    rows = [int(case.shape.tokens * case.mean_k) for case in cases]
    tiles = [
        choose_tiles("rows", number, case.shape.experts, torch.bfloat16, 90)
        for number, case in zip(rows, cases, strict=True)
    ]
    assert {own.rows for own in tiles} == {rows for _, rows in _ROW_TILES}
