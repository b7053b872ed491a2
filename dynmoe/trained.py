"""Trained models loaded whole into this process, and new runs that start from one."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from dynmoe.config import Config, load_config
from dynmoe.config.parallel import ParallelConfig
from dynmoe.convert import convert
from dynmoe.data.tokenizer import Tokenizer
from dynmoe.data.tokenizer_files import open_tokenizer
from dynmoe.engines import canonical_state
from dynmoe.engines.state_names import MASTER
from dynmoe.errors import UserError
from dynmoe.model import Decoder
from dynmoe.train.accounting import Progress
from dynmoe.train.checkpoint import Checkpoint, latest_valid, write_run
from dynmoe.train.resume import with_kept_fields
from dynmoe.train.run_directory import RunDirectory


@dataclass(frozen=True)
class TrainedDecoder:
    """The model of a run's latest valid checkpoint, of either engine.

    Attributes:
        config: configuration of the run.
        step: step of the checkpoint.
        decoder: the model in evaluation mode, with the fp32 masters as weights.
        device: the model's device.
    """

    config: Config
    step: int
    decoder: Decoder
    device: torch.device


@dataclass(frozen=True)
class TrainedModel(TrainedDecoder):
    """A trained decoder with the tokenizer of its run."""

    tokenizer: Tokenizer


def open_trained(
    run: Path, device: torch.device | None = None, experts_per_token: float | None = None, mtp: bool = False
) -> TrainedModel:
    """Loads the model and the tokenizer of a run; see :func:`open_decoder`.

    Raises:
        UserError: there is no run, no tokenizer or no valid checkpoint, or the model has no such budget.
    """
    directory = RunDirectory(run)
    load_config(directory.config)  # a missing run is reported before a missing tokenizer
    cure = "copy it from the corpus that the run was trained on"
    if not directory.tokenizer.exists():
        raise UserError(f"{directory.tokenizer} is missing; {cure}")
    tokenizer = open_tokenizer(directory.tokenizer, cure)
    for path in (run / name for name in tokenizer.files):
        if not path.exists():  # without it, the end of a text would be guessed
            raise UserError(f"{path} is missing; {cure}")
    return TrainedModel(**vars(open_decoder(run, device, experts_per_token, mtp)), tokenizer=tokenizer)


def open_decoder(
    run: Path, device: torch.device | None = None, experts_per_token: float | None = None, mtp: bool = False
) -> TrainedDecoder:
    """Loads the whole model of a run, which must fit into memory whatever the layout of the run.

    The MoE backend is chosen for ``device``, not taken from the run. The checkpoint of a Megatron run is first
    converted in the system's temporary directory.

    Args:
        run: directory of the run.
        device: device of the model; default: a GPU if there is one.
        experts_per_token: a number in the range of ``model.router.budgets``; default: ``budget.experts_per_token``.
        mtp: whether to load the layers that predict further tokens; without them, the configuration has none either.

    Raises:
        UserError: there is no run or no valid checkpoint, or the model has no such budget.
    """
    directory = RunDirectory(run)
    config = load_config(directory.config)
    if experts_per_token is not None:
        config.model.router.check_budget(experts_per_token, "--experts-per-token")
    if device is not None and device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        problem = f"PyTorch finds {torch.cuda.device_count()} GPU(s)"
        raise UserError(f"device {device}: {problem}; use another one, or cpu")
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = config.model if mtp else config.model.without_mtp()
    with _canonical_checkpoint(directory, config) as checkpoint:
        rows = canonical_state.read_shape(checkpoint.path, "w_embed_VD")[0]
        decoder = Decoder(model, rows, config.train.seed)
        decoder.context.aim(experts_per_token or config.budget.experts_per_token)
        canonical_state.load_weights(checkpoint.path, decoder, decoder.moe_layers)
    return TrainedDecoder(dataclasses.replace(config, model=model), checkpoint.step, decoder.to(device).eval(), device)


def begin_run(config: Config, decoder: Decoder, files: Mapping[str, bytes], output: Path) -> None:
    """Creates the run directory ``output``, whose first step starts from the weights of ``decoder``.

    Args:
        config: configuration of the run, for either engine.
        decoder: the whole model, with fp32 weights.
        files: contents of the tokenizer and other files of the model, by their path in the directory.
        output: directory of the run; must not exist.

    Raises:
        UserError: ``output`` exists.
    """
    if output.exists():
        raise UserError(f"{output} exists; name a new directory")
    # An evaluation before training must read text as training will.
    config = with_kept_fields(config, None)
    if config.engine == "megatron":
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as folder:
            canonical = dataclasses.replace(config, engine="deepspeed", parallel=ParallelConfig())
            begin_run(canonical, decoder, files, Path(folder) / "canonical")
            convert(Path(folder) / "canonical", output, "megatron", config.parallel)
        return
    ranges = canonical_state.expert_ranges(decoder.moe_layers)
    entries = [
        canonical_state.entry(
            name, parameter, tuple(parameter.shape), ranges, (), partial(_master, parameter), lambda values: None
        )
        for name, parameter in decoder.named_parameters()
    ]
    buffers = dict(decoder.named_buffers())

    def write(directory: Path) -> None:
        canonical_state.copy(directory, entries, buffers, step=0)()

    write_run(config, output, 0, dataclasses.asdict(Progress()), [], files, write)


def _master(parameter: nn.Parameter) -> dict[str, Tensor]:
    return {MASTER: parameter.detach()}


@contextmanager
def _canonical_checkpoint(directory: RunDirectory, config: Config) -> Iterator[Checkpoint]:
    """Gives the latest valid checkpoint in the canonical form; for Megatron, a temporary conversion of it."""
    if config.engine == "deepspeed":
        yield latest_valid(directory.checkpoints)
        return
    with tempfile.TemporaryDirectory() as folder:
        canonical = RunDirectory(Path(folder) / "canonical")
        convert(directory.path, canonical.path, "deepspeed")
        yield latest_valid(canonical.checkpoints)
