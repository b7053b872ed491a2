"""Megatron's checkpoints without their code: two of their parts are pickles, and a pickle can call anything.

``.metadata`` (which tensors lie where) is read by ``pickle.load``, state of layers that is no tensor by ``torch.load``
without its restriction. Hashes show that a file is as it was written, not who wrote it.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import pickletools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import CheckpointException, filesystem, metadata, planner

from dynmoe.errors import UserError, first_line

# What the description of a checkpoint is made of: records without methods of their own that pickle would call.
_RECORDS = {
    (kind.__module__, kind.__name__)
    for kind in (
        metadata.BytesStorageMetadata, metadata.ChunkStorageMetadata, metadata.Metadata, metadata.MetadataIndex,
        metadata.StorageMeta, metadata.TensorProperties, metadata.TensorStorageMetadata, metadata._MEM_FORMAT_ENCODING,
        planner.BytesIOWriteData, planner.SavePlan, planner.TensorWriteData, planner.WriteItem, planner.WriteItemType,
        filesystem._StorageInfo,
    )
} | {("torch", "Size"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict")}  # fmt: skip
_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_type = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_type or (module, name) in _RECORDS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _refusal(error: BaseException) -> str | None:
    """What a pickle wanted that it does not get, on whichever rank; None where that was not the trouble."""
    causes = [error] if not isinstance(error, CheckpointException) else [cause for cause, _ in error.failures.values()]
    refused = next((cause for cause in causes if isinstance(cause, pickle.UnpicklingError)), None)
    if refused is None:
        return None
    named = re.search(r"GLOBAL (\S+)", str(refused))
    return f"it names {named.group(1)}" if named else first_line(refused)


def _check_memo(content: bytes) -> None:
    """Refuses a pickle that makes room for more objects than it has bytes: six of them can ask for gigabytes."""
    for opcode, place, _ in pickletools.genops(content):
        if opcode.name.endswith("PUT") and isinstance(place, int) and place > len(content):
            raise ValueError(f"place {place} of {len(content)} bytes")


def _look_at(described: Path) -> None:
    """Reads a description and forgets it: afterwards it is known to be one."""
    with described.open("rb") as stream:
        try:
            content = stream.read()
            _check_memo(content)
            _Unpickler(io.BytesIO(content)).load()
        except pickle.UnpicklingError:
            raise
        except Exception as error:  # whatever bytes that are no pickle, or another one, come to
            problem = f"does not describe tensors ({first_line(error)})"
            raise UserError(f"checkpoint {described}: {problem}; go on from another checkpoint") from None


@contextlib.contextmanager
def tensors_only(folder: Path) -> Iterator[None]:
    """While Megatron loads from ``folder``: nothing in there can execute code.

    Raises:
        UserError: a file that is more than tensors and their description.
    """
    described = folder / ".metadata"
    before = os.environ.get(_FORCE)
    os.environ[_FORCE] = "1"
    try:
        _look_at(described)
        yield
    except FileNotFoundError as error:
        raise UserError(f"checkpoint {error.filename}: is missing; go on from another checkpoint") from None
    except (pickle.UnpicklingError, CheckpointException) as error:
        cause = _refusal(error)
        if cause is None:
            raise
        problem = f"is not only tensors and their description ({cause})"
        raise UserError(f"checkpoint {folder}: {problem}; it was not read, as it could execute code") from None
    finally:
        if before is None:
            del os.environ[_FORCE]
        else:
            os.environ[_FORCE] = before
