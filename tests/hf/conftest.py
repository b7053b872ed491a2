from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def _away_from_the_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Code that travels with weights is copied below HF_HOME: not into the user's; and nothing is asked of the hub."""
    from transformers import dynamic_module_utils

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("hf") / "modules"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield
