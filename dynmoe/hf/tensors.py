"""Access to the tensors of a safetensors checkpoint, one at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from dynmoe.errors import UserError, first_line

_WHOLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
FLOATS = ("F64", "F32", "BF16", "F16")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        UserError: the file does not exist, or does not contain a JSON object.
    """
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; name a directory with a checkpoint") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({first_line(error)}); restore it") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: must be a JSON object; restore it")
    return content


class Tensors:
    """The tensors in the safetensors files of a checkpoint, by name.

    As in transformers, a single file takes precedence over shards, and the last shard over others with the same name.

    Args:
        source: directory of the checkpoint.

    Raises:
        UserError: there are no such files, a file is damaged, or mlx-lm wrote it.
    """

    def __init__(self, source: Path) -> None:
        self.source = source
        self._file_of: dict[str, Any] = {}
        for path in self._files():
            try:
                file = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path}: {first_line(error)}; restore it") from None
            if (file.metadata() or {}).get("format") == "mlx":
                problem = "mlx-lm converted it and uses its own names and layout of tensors"
                raise UserError(f"{path}: {problem}; import the original checkpoint")
            self._file_of |= dict.fromkeys(file.keys(), file)

    def _files(self) -> Iterator[Path]:
        if (self.source / _WHOLE).is_file():
            yield self.source / _WHOLE
            return
        if not (self.source / _INDEX).is_file():
            cure = "save it as safetensors (pickles are not read, because they can execute code)"
            raise UserError(f"{self.source}: contains neither {_WHOLE} nor {_INDEX}; {cure}")
        names = read_json(self.source / _INDEX).get("weight_map")
        if not isinstance(names, dict) or any(not isinstance(n, str) or "/" in n for n in names.values()):
            raise UserError(f"{self.source / _INDEX}: must be an index of files in the same directory; restore it")
        yield from sorted({self.source / name for name in names.values()})

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(file.get_slice(name).get_shape()) for name, file in self._file_of.items()}

    def kinds(self) -> dict[str, str]:
        """Element types as named by safetensors, such as BF16."""
        return {name: file.get_slice(name).get_dtype() for name, file in self._file_of.items()}

    def read(self, name: str) -> Tensor:
        """Reads one tensor.

        Raises:
            UserError: some values are infinite or NaN.
        """
        tensor: Tensor = self._file_of[name].get_tensor(name)
        if tensor.numel() and not all(bool(end.isfinite()) for end in tensor.aminmax()):  # allocates no memory
            problem = f"{name} has {int((~tensor.isfinite()).sum())} values that are not finite"
            raise UserError(f"{self.source}: {problem}; use an intact checkpoint")
        return tensor

    def are_zeros(self, name: str) -> bool:
        """Whether a tensor is all zeros and not quantized."""
        return self._file_of[name].get_slice(name).get_dtype() in FLOATS and not bool(self.read(name).any())
