"""transformers' own tests of a model pass over our modelling code, whatever the router."""

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
# The first calls a dictionary as soon as a model has a boolean buffer; the other asks for a mixin of tests that the
# source distribution lacks.
NOT_OURS = {"test_torch_save_load", "test_generation_tester_mixin_inheritance"}
_PASS_AT_LEAST = 100  # of 104 to 105; the others are skipped: for GPUs, images and the like


@pytest.mark.served
@pytest.mark.parametrize("router", OWN)
def test_their_tests_of_a_model(router, tmp_path, summary):
    passed, failed = run_theirs(router, tmp_path)
    summary.append(
        f"transformers' model tests, {router}: {len(passed)} pass; {', '.join(sorted(failed)) or 'none fails'}"
    )
    assert {name: message for name, message in failed.items() if name not in NOT_OURS} == {}
    assert len(passed) >= _PASS_AT_LEAST


def run_theirs(router: str, folder: Path) -> tuple[set[str], dict[str, str]]:
    """Names of the tests that pass, and those that fail with the first line of why."""
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
    passed, failed = set(), {}
    for case in ElementTree.parse(report).iter("testcase"):
        faults = [fault for kind in ("failure", "error") for fault in case.findall(kind)]
        if faults:
            failed[case.attrib["name"]] = faults[0].attrib["message"].splitlines()[0]
        elif case.find("skipped") is None:
            passed.add(case.attrib["name"])
    return passed, failed
