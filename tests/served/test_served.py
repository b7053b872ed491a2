"""Every export gives the answers of transformers in common servers: ``make test-served``."""

from __future__ import annotations

import pytest

from harness.processes import ROOT
from tests.pages import write
from tests.served.answers import SAME
from tests.served.measured import CLIENTS, LLAMA, MLX, Measured
from tests.served.models import DENSE, DYNAMIC, NORMALIZED
from tests.served.table import table

pytestmark = pytest.mark.served


# mlx-lm's Qwen2-MoE ignores dense layers and the normalization of gates; llama.cpp's requires experts in every layer.
UNSUPPORTED = {MLX: (*DYNAMIC, DENSE, NORMALIZED), LLAMA: (*DYNAMIC, DENSE)}


@pytest.fixture(scope="module")
def measured(corpus_dir, tmp_path_factory, away_from_the_hub) -> Measured:
    return Measured(corpus_dir, tmp_path_factory.mktemp("served"))


@pytest.mark.parametrize("client", CLIENTS)
def test_a_client_gives_the_answers_of_transformers(measured, client):
    """Known differences must persist, otherwise the export's last line and the page are out of date."""
    column = measured.column(client)
    unsupported = UNSUPPORTED.get(client, ())
    assert {name: cell for name, cell in column.items() if cell != SAME and name not in unsupported} == {}
    assert [name for name in unsupported if column[name] == SAME] == []


def test_the_table_is_written(measured):
    cells = {client: measured.column(client) for client in CLIENTS}
    text = table(cells, measured.versions)
    print(text)
    write(ROOT / "docs" / "serving.md", "make test-served", text)
