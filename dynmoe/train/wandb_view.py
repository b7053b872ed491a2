"""A view of the metrics in Weights & Biases, which never blocks or fails the training."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import secrets
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import wandb

from dynmoe.config import Config
from dynmoe.data.corpus import MANIFEST
from dynmoe.data.tokenizer_files import TOKENIZER_FILES
from dynmoe.errors import first_line
from dynmoe.train.checkpoint import latest_complete, write_atomically
from dynmoe.train.metrics import Histograms, Pictures, Row
from dynmoe.train.run_directory import RunDirectory

# Together with the fallback to offline mode, this delays the start of a run by at most 10 s.
_INIT_TIMEOUT_S = 5.5
_FINISH_TIMEOUT_S = 60.0
_FLUSH_S = 1.0  # default 15; rows of this time are lost if a scheduler kills W&B's service with the ranks
_SERVICE = "wandb-core"
_LONGEST_NAME = 128  # W&B's limit for names of runs, groups and artifacts, in characters
_MOST_BINS = 512  # W&B's limit; tokens with more experts are not in its histogram


class WandbView:
    """A W&B run, offline or online. If the server is unreachable, it falls back to offline mode within 10 s.

    Rows are logged unchanged; at steps with histograms also experts per token of each layer as histograms and the load
    of every expert as a picture. At the start, configuration, tokenizer and corpus manifests are logged as an artifact;
    at the end, a reference to the latest checkpoint and the report's pictures.

    Args:
        config: configuration of the run.
        directory: directory of the run, which also receives W&B's files.
        pictures: draws the report's figures of a run directory, by name.
        run_id: W&B id in the checkpoint from which the run resumes. If None, the id of an earlier start that ended
            before its first checkpoint is used, or else a new one.
    """

    name = "W&B"

    def __init__(self, config: Config, directory: RunDirectory, pictures: Pictures, run_id: str | None) -> None:
        stored = directory.wandb_id.read_text() if directory.wandb_id.exists() else None
        self.run_id = run_id or stored or secrets.token_hex(4)
        write_atomically(directory.wandb_id, self.run_id)
        self._directory = directory
        self._pictures = pictures
        self._run_name = config.run.name
        self._run = _start(config, str(directory.path), self.run_id)
        self._run.define_metric("train/step")
        self._run.define_metric("*", step_metric="train/step")
        self._attempt(lambda: self._keep_inputs(config.data.dirs), "the run has no artifact of its inputs")

    def log(self, row: Row, histograms: Histograms | None = None) -> None:
        drawn: dict[str, Any] = {}
        if histograms is not None:
            self._attempt(lambda: drawn.update(_media(histograms)), "this row has no histograms")
        self._run.log({**row, **drawn})

    def close(self) -> None:
        """Ends the run; afterwards every row is uploaded or in a file that ``wandb sync`` can upload."""
        self._attempt(self._keep_outputs, "the run has no pictures")
        failures: list[BaseException] = []
        finishing = threading.Thread(target=self._finish, args=(failures,), name="W&B", daemon=True)
        finishing.start()
        # Despite its timeout, finish waits forever for the upload of artifacts if the server is gone.
        finishing.join(1.5 * _FINISH_TIMEOUT_S)
        if given_up := finishing.is_alive():
            for child in psutil.Process().children():
                if child.name() == _SERVICE:
                    child.kill()
            finishing.join()
            command = f"wandb sync --include-online {self._run.settings.sync_dir}"
            print(f"W&B upload is incomplete; run {command} to complete it", flush=True)
        if failures:
            with contextlib.suppress(Exception):  # else a traceback about the dead service is printed at exit
                wandb.teardown()
            if not given_up:
                raise failures[0]

    def _finish(self, failures: list[BaseException]) -> None:
        try:
            self._run.finish()
            # finish only asks W&B's service to close the file of the run; teardown waits for the service to exit.
            wandb.teardown()
        except BaseException as error:
            failures.append(error)

    def _keep_inputs(self, corpora: Sequence[str]) -> None:
        artifact = wandb.Artifact(name_within_limit(self._run_name, "-inputs"), type="inputs")
        artifact.add_file(str(self._directory.config))
        for path in (self._directory.path / name for name in TOKENIZER_FILES):
            if path.exists():
                artifact.add_file(str(path))
        for number, corpus in enumerate(corpora):
            artifact.add_file(str(Path(corpus) / MANIFEST), name=f"corpus_{number}_{MANIFEST}")
        self._run.log_artifact(artifact)

    def _keep_outputs(self) -> None:
        checkpoint = latest_complete(self._directory.checkpoints)
        if checkpoint is not None:
            name = name_within_limit(self._run_name, "-checkpoint")
            artifact = wandb.Artifact(name, type="checkpoint", metadata={"step": checkpoint.step})
            # A reference, as checkpoints are large and have their own hashes.
            artifact.add_reference(f"file://{checkpoint.path.resolve()}", checksum=False)
            self._run.log_artifact(artifact)
        drawn = {
            f"report/{name}": wandb.Plotly(figure) for name, figure in self._pictures(self._directory.path).items()
        }
        if drawn:
            self._run.log(drawn)

    @staticmethod
    def _attempt(action: Callable[[], object], consequence: str) -> None:
        """Runs an optional action; a failure is printed, not raised."""
        try:
            action()
        except Exception as error:
            print(f"W&B failed ({first_line(error)}); {consequence}", flush=True)


def name_within_limit(name: str, ending: str = "") -> str:
    """The name and its ending; the end of a name that is too long for W&B is replaced by a hash."""
    room = _LONGEST_NAME - len(ending)
    if len(name) > room:
        digest = hashlib.sha256(name.encode()).hexdigest()[:8]
        name = f"{name[: room - len(digest) - 1]}-{digest}"
    return name + ending


def _start(config: Config, directory: str, run_id: str) -> Any:
    name = name_within_limit(config.run.name)
    arguments: dict[str, Any] = {
        "project": config.logging.wandb_project, "name": name, "group": name, "dir": directory,
        "config": dataclasses.asdict(config), "id": run_id, "resume": "allow",
        "settings": wandb.Settings(
            init_timeout=_INIT_TIMEOUT_S, finish_timeout=_FINISH_TIMEOUT_S, silent=True, console="off",
            x_transaction_log_flush_interval=_FLUSH_S,
            git_remote="",  # the URL may contain a token
        ),
    }  # fmt: skip
    mode = config.logging.wandb
    try:
        # Without silent, login requests the user name from the server to print it; without the mode, init loads what
        # it needs to report its own use, also offline.
        wandb.setup(settings=wandb.Settings(silent=True, mode=mode))
        if mode == "online" and not wandb.login(prompt=False, verify=False):
            # init would prompt for a key on the terminal, while the other ranks wait.
            raise wandb.errors.UsageError("no API key; run wandb login")
        return wandb.init(mode=mode, **arguments)  # type: ignore[arg-type]
    except Exception as error:  # of any kind, as training does not depend on W&B
        print(f"W&B cannot be reached ({first_line(error)}); logging offline into {directory}", flush=True)
        wandb.teardown()  # else the id is still in use
        return wandb.init(mode="offline", **arguments)


def _media(histograms: Histograms) -> dict[str, Any]:
    """Experts per token of each layer as histograms, and the load of every expert of all layers as a picture.

    W&B tables are not used because they are artifacts, each of which blocks training for 19 s if the server is down.
    """
    import plotly.graph_objects as go

    drawn: dict[str, Any] = {}
    layers = []
    loads = []
    for layer, own in histograms["layers"].items():
        counts = np.trim_zeros(np.array(own["experts_per_token"]), "b")[:_MOST_BINS]
        edges = np.arange(len(counts) + 1) - 0.5
        drawn[f"moe/layer_{int(layer):02d}/experts_per_token"] = wandb.Histogram(np_histogram=(counts, edges))
        layers.append(f"layer {layer}")
        loads.append([tokens if active else None for tokens, active in zip(own["load"], own["active"], strict=True)])
    if drawn:
        figure = go.Figure(go.Heatmap(z=loads, y=layers, colorscale="Viridis", colorbar_title="tokens"))
        figure.update_layout(title=f"tokens of each expert, step {histograms['train/step']}", xaxis_title="expert")
        drawn["moe/load"] = wandb.Plotly(figure)
    return drawn
