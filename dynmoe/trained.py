"""A trained model, whole, in this process: what looks at one, or uses it, begins here; and runs that begin with one."""

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
from dynmoe.engines import plain_state
from dynmoe.engines.state_names import MASTER
from dynmoe.errors import UserError
from dynmoe.model import Decoder
from dynmoe.train.accounting import Progress
from dynmoe.train.checkpoint import Checkpoint, newest_sound, write_run
from dynmoe.train.run_directory import RunDirectory


@dataclass(frozen=True)
class TrainedDecoder:
    """The newest sound checkpoint of a run, of either engine.

    Attributes:
        config: of the run.
        step: of the checkpoint.
        decoder: in evaluation, with fp32 masters as weights.
        device: where the model is.
    """

    config: Config
    step: int
    decoder: Decoder
    device: torch.device


@dataclass(frozen=True)
class TrainedModel(TrainedDecoder):
    """The same with the tokenizer of the run."""

    tokenizer: Tokenizer


def open_trained(run: Path, device: torch.device | None = None) -> TrainedModel:
    """Reads the model of a run and its tokenizer; see :func:`open_decoder`.

    Raises:
        UserError: no run, no tokenizer, or no undamaged checkpoint.
    """
    directory = RunDirectory(run)
    load_config(directory.config)  # that there is none is said before that it has no tokenizer
    cure = "copy it from the corpus that the run was trained on"
    if not directory.tokenizer.exists():
        raise UserError(f"{directory.tokenizer} is missing; {cure}")
    tokenizer = Tokenizer(directory.tokenizer, cure)
    return TrainedModel(**vars(open_decoder(run, device)), tokenizer=tokenizer)


def open_decoder(run: Path, device: torch.device | None = None) -> TrainedDecoder:
    """Reads the model of a run; it needs memory for all of it, whatever layout the run had.

    What computes the experts is chosen for ``device``, whatever the run trained with. The checkpoint of a Megatron run
    is converted in the system's temporary directory first.

    Args:
        run: directory of the run.
        device: where the model goes; a GPU where there is one, by default.

    Raises:
        UserError: no run, or no undamaged checkpoint.
    """
    directory = RunDirectory(run)
    config = load_config(directory.config)
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with _plain_checkpoint(directory, config) as checkpoint:
        rows = plain_state.read_shape(checkpoint.path, "w_embed_VD")[0]
        decoder = Decoder(config.model, rows, config.train.seed)
        plain_state.load_weights(checkpoint.path, decoder, decoder.moe_layers)
    return TrainedDecoder(config, checkpoint.step, decoder.to(device).eval(), device)


def begin_run(config: Config, decoder: Decoder, files: Mapping[str, bytes], output: Path) -> None:
    """Makes the run directory ``output``, whose first step starts from the weights of ``decoder``.

    Args:
        config: of the run, for either engine.
        decoder: whole, with fp32 weights.
        files: further ones, by their place in the directory: sentencepiece's, and what else belongs to the model.
        output: must not exist.

    Raises:
        UserError: it does.
    """
    if output.exists():
        raise UserError(f"{output} exists; name a new directory")
    if config.engine == "megatron":
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as folder:
            plain = dataclasses.replace(config, engine="deepspeed", parallel=ParallelConfig())
            begin_run(plain, decoder, files, Path(folder) / "plain")
            convert(Path(folder) / "plain", output, "megatron", config.parallel)
        return
    ranges = plain_state.expert_ranges(decoder.moe_layers)
    entries = [
        plain_state.entry(name, parameter, ranges, partial(_master, parameter), lambda values: None)
        for name, parameter in decoder.named_parameters()
    ]
    buffers = dict(decoder.named_buffers())

    def write(directory: Path) -> None:
        plain_state.copy(directory, entries, buffers, step=0)()

    write_run(config, output, 0, dataclasses.asdict(Progress()), [], files, write)


def _master(parameter: nn.Parameter) -> dict[str, Tensor]:
    return {MASTER: parameter.detach()}


@contextmanager
def _plain_checkpoint(directory: RunDirectory, config: Config) -> Iterator[Checkpoint]:
    """The newest sound checkpoint in the plain form; one of Megatron is converted, and forgotten afterwards."""
    if config.engine == "deepspeed":
        yield newest_sound(directory.checkpoints)
        return
    with tempfile.TemporaryDirectory() as folder:
        plain = RunDirectory(Path(folder) / "plain")
        convert(directory.path, plain.path, "deepspeed")
        yield newest_sound(plain.checkpoints)
