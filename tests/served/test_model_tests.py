"""Our modeling code passes transformers' own tests of a model, for every router."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from harness.processes import CPU, ROOT
from tests.hf.cases import OWN
from tests.served.environments import PARAMETERIZED, THEIR_TESTS, installed

_SUITE = Path(__file__).with_name("their_model_tests.py")
# The first fails for any model with a boolean buffer, because it calls a dictionary; the other requires a mixin that
# the source distribution lacks.
NOT_OURS = {"test_torch_save_load", "test_generation_tester_mixin_inheritance"}
_PASS_AT_LEAST = 100  # of 104 to 105; the others are skipped, because they require GPUs, images and so on


@pytest.mark.served
@pytest.mark.parametrize("router", OWN)
def test_transformers_own_tests_pass(router, tmp_path, summary):
    passed, failed = run_theirs(router, tmp_path)
    failures = ", ".join(sorted(failed)) or "none fails"
    summary.append(f"transformers' model tests, {router}: {len(passed)} pass; {failures}")
    assert {name: message for name, message in failed.items() if name not in NOT_OURS} == {}
    assert len(passed) >= _PASS_AT_LEAST


def run_theirs(router: str, folder: Path) -> tuple[set[str], dict[str, str]]:
    """Names of the tests that pass, and of those that fail with the first line of the error."""
    paths = [str(ROOT), str(installed(PARAMETERIZED))]
    environment = os.environ | CPU | {
        "ROUTER": router, "THEIR_TESTS": str(installed(THEIR_TESTS)), "PYTHONPATH": os.pathsep.join(paths),
        "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home"),
    }  # fmt: skip
    report = folder / "report.xml"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, f"--rootdir={folder}", "--noconftest", "-p",
         "no:cacheprovider", f"--junit-xml={report}", str(_SUITE)],
        cwd=folder, env=environment, check=False, text=True, capture_output=True, timeout=300,
    )  # fmt: skip
    assert report.exists(), f"{done.stdout[-2000:]} {done.stderr[-2000:]}"
    passed = set()
    failed = {}
    for case in ElementTree.parse(report).iter("testcase"):
        faults = [fault for kind in ("failure", "error") for fault in case.findall(kind)]
        if faults:
            failed[case.attrib["name"]] = faults[0].attrib["message"].splitlines()[0]
        elif case.find("skipped") is None:
            passed.add(case.attrib["name"])
    return passed, failed
