"""Loads Megatron checkpoints without executing code from them: they contain pickles, which can call any function.

Megatron reads ``.metadata`` (the location of each tensor) with ``pickle.load``, and non-tensor state of layers with
``torch.load`` without ``weights_only``. Hashes show that a file is unchanged, not that its author is trusted.
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

# Classes in a checkpoint's metadata: plain records, without methods that unpickling would call.
_ALLOWED = {
    (kind.__module__, kind.__name__)
    for kind in (
        metadata.BytesStorageMetadata, metadata.ChunkStorageMetadata, metadata.Metadata, metadata.MetadataIndex,
        metadata.StorageMeta, metadata.TensorProperties, metadata.TensorStorageMetadata, metadata._MEM_FORMAT_ENCODING,
        planner.BytesIOWriteData, planner.SavePlan, planner.TensorWriteData, planner.WriteItem, planner.WriteItemType,
        filesystem._StorageInfo,
    )
} | {("torch", "Size"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict")}  # fmt: skip
_FORCE_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_type = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_type or (module, name) in _ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it references {module}.{name}")


def _refused_global(error: BaseException) -> str | None:
    """Describes the global that unpickling refused, on any rank; None if the error has another cause."""
    causes = [error] if not isinstance(error, CheckpointException) else [cause for cause, _ in error.failures.values()]
    refused = next((cause for cause in causes if isinstance(cause, pickle.UnpicklingError)), None)
    if refused is None:
        return None
    named = re.search(r"GLOBAL (\S+)", str(refused))
    return f"it references {named.group(1)}" if named else first_line(refused)


def _check_memo(content: bytes) -> None:
    """Refuses memo indices above the size of the pickle: six bytes can make unpickling allocate gigabytes."""
    for opcode, index, _ in pickletools.genops(content):
        if opcode.name.endswith("PUT") and isinstance(index, int) and index > len(content):
            raise ValueError(f"memo index {index} in {len(content)} bytes")


def _check_metadata(path: Path) -> None:
    """Unpickles a metadata file with the allowed classes only, and discards the result."""
    with path.open("rb") as stream:
        try:
            content = stream.read()
            _check_memo(content)
            _Unpickler(io.BytesIO(content)).load()
        except pickle.UnpicklingError:
            raise
        except Exception as error:  # arbitrary bytes can raise anything
            problem = f"is not valid tensor metadata ({first_line(error)})"
            raise UserError(f"checkpoint {path}: {problem}; resume from another checkpoint") from None


@contextlib.contextmanager
def tensors_only(folder: Path) -> Iterator[None]:
    """Context in which loading from ``folder`` cannot execute code.

    Raises:
        UserError: a file is missing, or contains objects other than tensors and their metadata.
    """
    before = os.environ.get(_FORCE_WEIGHTS_ONLY)
    os.environ[_FORCE_WEIGHTS_ONLY] = "1"
    try:
        _check_metadata(folder / ".metadata")
        yield
    except FileNotFoundError as error:
        raise UserError(f"checkpoint {error.filename}: is missing; resume from another checkpoint") from None
    except (pickle.UnpicklingError, CheckpointException) as error:
        cause = _refused_global(error)
        if cause is None:
            raise
        problem = f"contains more than tensors and their metadata ({cause}) and could execute code"
        raise UserError(f"checkpoint {folder}: {problem}; resume from another checkpoint") from None
    finally:
        if before is None:
            del os.environ[_FORCE_WEIGHTS_ONLY]
        else:
            os.environ[_FORCE_WEIGHTS_ONLY] = before
