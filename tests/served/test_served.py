"""Every export answers in the servers that people have as it does in transformers: ``make test-served``."""

from __future__ import annotations

import pytest

from tests.served.answers import SAME
from tests.served.measured import CLIENTS, LLAMA, MLX, Measured
from tests.served.models import DYNAMIC, FIXED
from tests.served.table import table, write

pytestmark = pytest.mark.served


@pytest.fixture(scope="module")
def measured(corpus_dir, tmp_path_factory, away_from_the_hub) -> Measured:
    return Measured(corpus_dir, tmp_path_factory.mktemp("served"))


@pytest.mark.parametrize("client", CLIENTS)
def test_a_client_answers_as_transformers_does(measured, client):
    """A fixed number of experts everywhere, a dynamic one in vLLM; the others say that they do not know it."""
    column = measured.column(client)
    known = FIXED if client in (MLX, LLAMA) else FIXED | DYNAMIC
    assert {name: column[name] for name in known if column[name] != SAME} == {}
    assert all(column[name].startswith("refused: ") for name in DYNAMIC if name not in known)


def test_the_table_is_written(measured):
    cells = {client: measured.column(client) for client in CLIENTS}
    text = table(cells, measured.versions)
    print(text)
    write(text)
