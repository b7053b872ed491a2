from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.workers import WorkerPool

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("MPLBACKEND", "agg")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
torch.set_num_threads(1)
settings.register_profile(
    "project", max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
# make test-faults: other inputs each time, and the line that gives a failing one again.
settings.register_profile(
    "fuzz", max_examples=10_000, deadline=None, print_blob=True, suppress_health_check=list(HealthCheck)
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "project"))


_SUMMARY: list[str] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("screenshots", "pictures of the report and the token view (tests/report/test_browser.py)")
    group.addoption("--screenshots", metavar="DIR", help="folder in which they are kept")
    group.addoption("--screenshot-run", metavar="RUN", help="run that they show; default: a small one")
    group.addoption("--screenshot-images", metavar="PAGE", help="token view with images; default: a small one")


@pytest.fixture(scope="session")
def summary() -> list[str]:
    """Collects lines that are printed after all tests."""
    return _SUMMARY


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in _SUMMARY:
        terminalreporter.write_line(line)


_POOLS = {world_size: WorkerPool(world_size) for world_size in (1, 2, 4)}


@pytest.fixture(scope="module", autouse=True)
def no_idle_ranks() -> Iterator[None]:
    """Ends the ranks of a file's tests: idle ones keep waking up, and starting them again is cheap."""
    yield
    for pool in _POOLS.values():
        pool.stop()


@pytest.fixture(scope="session")
def one_rank() -> WorkerPool:
    return _POOLS[1]


@pytest.fixture(scope="session")
def two_ranks() -> WorkerPool:
    return _POOLS[2]


@pytest.fixture(scope="session")
def four_ranks() -> WorkerPool:
    return _POOLS[4]


@pytest.fixture(scope="session")
def corpus_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small corpus of generated text, prepared by data_prep."""
    from data_prep.build import build
    from data_prep.recipe import Recipe
    from tests.texts import write_texts

    root = tmp_path_factory.mktemp("corpus")
    write_texts(root / "text", documents=60)
    build(Recipe([str(root / "text")], vocab_size=400, validation_fraction=0.2), root / "prepared", workers=1)
    return root / "prepared"


@pytest.fixture(scope="session")
def undisturbed(corpus_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Directory and output of a finished run of train.py on two ranks; must not be modified."""
    from tests.train.cases import TrainingProcess

    runs = tmp_path_factory.mktemp("undisturbed") / "runs"
    process = TrainingProcess(corpus_dir, runs, "logging.tensorboard=true")
    assert process.wait() == 0, process.output()
    return runs / "tiny", process.output()


@pytest.fixture(scope="session")
def away_from_the_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Sets a temporary HF_HOME, into which code of models is copied, and disables access to the hub."""
    from transformers import dynamic_module_utils

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("hf") / "modules"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield
