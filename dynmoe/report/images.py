"""Images in the token view: a document may begin with an image whose patches are tokens."""

from __future__ import annotations

import base64
import struct
import zlib
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Image:
    """An image of which each patch is a token, row by row.

    Attributes:
        pixels_HW3: red, green and blue, uint8.
        rows, columns: number of patches.
    """

    pixels_HW3: Tensor
    rows: int
    columns: int

    @property
    def patches(self) -> int:
        return self.rows * self.columns

    def data(self) -> dict[str, Any]:
        """The image as JSON: ``url`` (a PNG within it), ``rows`` and ``columns``."""
        url = f"data:image/png;base64,{base64.b64encode(png(self.pixels_HW3)).decode()}"
        return {"url": url, "rows": self.rows, "columns": self.columns}

    def name(self, patch: int) -> str:
        row, column = divmod(patch, self.columns)
        return f"patch in row {row + 1}, column {column + 1}"


def png(pixels_HW3: Tensor) -> bytes:
    """A PNG file of red, green and blue, uint8."""
    height, width, _ = pixels_HW3.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    lines = b"".join(b"\0" + bytes(line) for line in pixels_HW3.flatten(1).tolist())  # 0: a line is not filtered
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, data) for name, data in parts)


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
