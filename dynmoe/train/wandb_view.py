"""Weights & Biases as a view of the metrics: never in the way of the training."""

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
from dynmoe.errors import first_line
from dynmoe.train.checkpoint import newest_complete, write_atomically
from dynmoe.train.metrics import Histograms, Pictures, Row
from dynmoe.train.run_directory import RunDirectory

# With what W&B needs to give up, start anew offline and say so, a run starts at most 10 s later.
_INIT_TIMEOUT_S = 5.5
_FINISH_TIMEOUT_S = 60.0
_FLUSH_S = 1.0  # of rows may be lost with W&B's service, which a scheduler ends with the ranks; by default 15
_SERVICE = "wandb-core"
_LONGEST_NAME = 128  # characters of a run's, a group's and an artifact's name; W&B refuses longer ones
_MOST_BINS = 512  # W&B refuses more; tokens of more experts are not in its histogram


class WandbView:
    """A W&B run, offline or online; online and unreachable, it goes on offline within 10 s and says so.

    Rows are logged as they are. Beside them, on the steps that have histograms: experts per token of each layer as
    histograms, the load of every expert as a picture. Configuration, tokenizer and manifests of the corpora are an
    artifact of the run's start; a reference to the newest checkpoint is one of its end, and so are the report's
    pictures.

    Args:
        config: of the run.
        directory: of the run, which W&B's own files go into.
        pictures: draws the report's figures of a run directory, by name.
        run_id: of the checkpoint that the run goes on from; None where there is none. Then it is that of an earlier
            start which ended before its first checkpoint, or a new one.
    """

    name = "W&B"

    def __init__(self, config: Config, directory: RunDirectory, pictures: Pictures, run_id: str | None) -> None:
        stored = directory.wandb_id.read_text() if directory.wandb_id.exists() else None
        self.run_id = run_id or stored or secrets.token_hex(4)
        write_atomically(directory.wandb_id, self.run_id)
        self._directory, self._pictures, self._run_name = directory, pictures, config.run.name
        self._run = _start(config, str(directory.path), self.run_id)
        self._run.define_metric("train/step")
        self._run.define_metric("*", step_metric="train/step")
        self._attempt(lambda: self._keep_inputs(config.data.dirs), "the run is without its artifact of inputs")

    def log(self, row: Row, histograms: Histograms | None = None) -> None:
        drawn: dict[str, Any] = {}
        if histograms is not None:
            self._attempt(lambda: drawn.update(_media(histograms)), "this row is without histograms")
        self._run.log({**row, **drawn})

    def close(self) -> None:
        """Ends the run; when it returns, every row is uploaded or in a file that ``wandb sync`` uploads later."""
        self._attempt(self._keep_outputs, "the run is without its pictures")
        failures: list[BaseException] = []
        finishing = threading.Thread(target=self._finish, args=(failures,), name="W&B", daemon=True)
        finishing.start()
        # Whatever its timeout says, finish waits without end for artifacts that a server which is gone does not take.
        finishing.join(1.5 * _FINISH_TIMEOUT_S)
        if given_up := finishing.is_alive():
            for child in psutil.Process().children():
                if child.name() == _SERVICE:
                    child.kill()
            finishing.join()
            print(f"W&B did not take all of the run; wandb sync {self._run.settings.sync_dir} uploads it", flush=True)
        if failures:
            with contextlib.suppress(Exception):  # the service is gone, which Python's exit would tell at length
                wandb.teardown()
            if not given_up:
                raise failures[0]

    def _finish(self, failures: list[BaseException]) -> None:
        try:
            self._run.finish()
            # finish only asks W&B's service to close the run's file; the end of the service is waited for.
            wandb.teardown()
        except BaseException as error:
            failures.append(error)

    def _keep_inputs(self, corpora: Sequence[str]) -> None:
        artifact = wandb.Artifact(name_within_limit(self._run_name, "-inputs"), type="inputs")
        artifact.add_file(str(self._directory.config))
        artifact.add_file(str(self._directory.tokenizer))
        for number, corpus in enumerate(corpora):
            artifact.add_file(str(Path(corpus) / MANIFEST), name=f"corpus_{number}_{MANIFEST}")
        self._run.log_artifact(artifact)

    def _keep_outputs(self) -> None:
        checkpoint = newest_complete(self._directory.checkpoints)
        if checkpoint is not None:
            name = name_within_limit(self._run_name, "-checkpoint")
            artifact = wandb.Artifact(name, type="checkpoint", metadata={"step": checkpoint.step})
            # A reference: checkpoints stay where they are, and have hashes of their own.
            artifact.add_reference(f"file://{checkpoint.path.resolve()}", checksum=False)
            self._run.log_artifact(artifact)
        drawn = {
            f"report/{name}": wandb.Plotly(figure) for name, figure in self._pictures(self._directory.path).items()
        }
        if drawn:
            self._run.log(drawn)

    @staticmethod
    def _attempt(action: Callable[[], object], consequence: str) -> None:
        """Does what the run can be without; a failure is said, not raised."""
        try:
            action()
        except Exception as error:
            print(f"W&B failed ({first_line(error)}); {consequence}", flush=True)


def name_within_limit(name: str, ending: str = "") -> str:
    """A name and its ending; one that W&B would refuse keeps its beginning, and a hash stands for the rest."""
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
            git_remote="",  # the commit, not the address it is fetched from: that may hold a token
        ),
    }  # fmt: skip
    mode = config.logging.wandb
    try:
        # Or login asks the server for the name of the user, to print it.
        wandb.setup(settings=wandb.Settings(silent=True))
        if mode == "online" and not wandb.login(prompt=False, verify=False):
            # init would ask for a key at the terminal, while the other ranks wait.
            raise wandb.errors.UsageError("no API key; wandb login keeps one")
        return wandb.init(mode=mode, **arguments)  # type: ignore[arg-type]
    except Exception as error:  # whatever it is: the training does not depend on it
        print(f"W&B cannot be reached ({first_line(error)}); logging offline into {directory}", flush=True)
        wandb.teardown()  # or the id counts as in use
        return wandb.init(mode="offline", **arguments)


def _media(histograms: Histograms) -> dict[str, Any]:
    """Experts per token of each layer as histograms, and the load of every expert of all layers as a picture.

    A table of W&B's own is an artifact: while a server does not answer, each would cost the training 19 s.
    """
    import plotly.graph_objects as go

    drawn: dict[str, Any] = {}
    layers, loads = [], []
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
