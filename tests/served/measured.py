"""The answers of each client for each model, measured once."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from dynmoe.errors import UserError
from tests.served.answers import SAME, ask_transformers, difference
from tests.served.clients import Said, ask_client
from tests.served.models import call_hf, make_models
from tests.texts import make_text

EAGER = "vLLM, eager"
COMPILED = "vLLM, compiled"
TWO_RANKS = "vLLM, 2 ranks"
AT_ONCE = "vLLM, 32 at once"
MLX = "mlx-lm"
LLAMA = "llama.cpp"
CLIENTS = (EAGER, AT_ONCE, COMPILED, TWO_RANKS, MLX, LLAMA)
# Parts of sentences with different lengths.
_REQUESTS = [make_text(number).splitlines()[1][number % 7 : 12 + number % 20] for number in range(32)]
_ENGINES: dict[str, dict[str, Any]] = {
    EAGER: {"enforce_eager": True},
    COMPILED: {},
    TWO_RANKS: {"enforce_eager": True, "tensor_parallel_size": 2},
}
# The engine runs in the client's process, which imports vLLM once for all models; ranks have their own processes.
_IN_ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
_ON_TWO_CORES = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
_TIMEOUT_S = 1800.0  # for all models


class Measured:
    """Trains and exports the models, and runs each client on demand.

    Attributes:
        versions: versions of the packages of the clients that have run.
    """

    def __init__(self, corpus: Path, folder: Path) -> None:
        self.versions: dict[str, str] = {}
        self._folder = folder
        self._columns: dict[str, dict[str, str]] = {}
        self._models = make_models(corpus, folder)
        self._exports = {name: model.export for name, model in self._models.items()}
        self._expected = {name: ask_transformers(export) for name, export in self._exports.items()}

    def column(self, client: str) -> dict[str, str]:
        """Results of a client by model: ``same``, or the difference."""
        if client not in self._columns:
            if client == AT_ONCE:
                self.column(EAGER)  # which measures both
            elif client == LLAMA:
                self._ask_llama()
            elif client == MLX:
                self._keep(MLX, ask_client("mlx", self._exports, self._folder / MLX, _TIMEOUT_S))
            else:
                self._ask_vllm(client)
        return self._columns[client]

    def _ask_vllm(self, client: str) -> None:
        requests = _REQUESTS if client == EAGER else []
        environment = _IN_ONE_PROCESS | (_ON_TWO_CORES if client == TWO_RANKS else {})
        folder = self._folder / re.sub(r"\W+", "_", client)  # vLLM's compiler does not support spaces
        said = ask_client(
            "vllm", self._exports, folder, _TIMEOUT_S, environment, engine=_ENGINES[client], requests=requests
        )
        self._keep(client, said)
        if requests:
            self._columns[AT_ONCE] = {name: _together(own) for name, own in said.items()}

    def _ask_llama(self) -> None:
        """Runs llama.cpp on the models that can be exported to GGUF; the others get the export's error."""
        files = {}
        refusals = {}
        folder = self._folder / LLAMA
        folder.mkdir()
        for number, (name, model) in enumerate(self._models.items()):
            file = folder / f"{number}.gguf"
            try:
                call_hf("gguf", model.run, file)
                files[name] = file
            except UserError as error:
                refusals[name] = Said(error=str(error))
        self._keep(LLAMA, ask_client("llama", files, folder, _TIMEOUT_S) | refusals)

    def _keep(self, client: str, said: dict[str, Said]) -> None:
        self._columns[client] = {
            name: _refused(own) or difference(own.answers, self._expected[name]) for name, own in said.items()
        }
        for own in said.values():
            self.versions |= own.versions


def _refused(said: Said) -> str:
    """The error, or an empty string if there are answers."""
    return f"refused: {said.error.splitlines()[0]}" if said.error else ""


def _together(said: Said) -> str:
    """Compares the answers to 32 requests at once with the answers to each alone."""
    other = f"other tokens ({said.apart} of {len(_REQUESTS)})" if said.apart else SAME
    return _refused(said) or other
