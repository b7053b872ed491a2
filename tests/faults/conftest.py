from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.cases import MEGATRON
from tests.train.cases import TrainingProcess


@pytest.fixture(scope="session")
def undisturbed_pipeline(corpus_dir, tmp_path_factory) -> Path:
    """A finished Megatron run with two pipeline stages."""
    runs = tmp_path_factory.mktemp("pipeline") / "runs"
    process = TrainingProcess(corpus_dir, runs, *MEGATRON)
    assert process.wait() == 0, process.output()
    return runs / "tiny"
