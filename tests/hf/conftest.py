from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _offline(away_from_the_hub: None) -> None:
    """Every test here loads transformers models."""
