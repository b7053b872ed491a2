"""The alphabet of byte-level tokenizers, which write each byte as one printable character (GPT-2's convention).

Bytes that are printable in Latin-1 stand for themselves; the others, in order, for the characters from U+0100 on.
"""

from __future__ import annotations

_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(0x100) if byte not in _PRINTABLE]
CHARACTERS = {byte: chr(byte) for byte in _PRINTABLE} | {byte: chr(0x100 + n) for n, byte in enumerate(_OTHERS)}
BYTES = {character: byte for byte, character in CHARACTERS.items()}


def to_characters(raw: bytes) -> str:
    """Writes bytes in the alphabet."""
    return "".join(map(CHARACTERS.__getitem__, raw))


def to_bytes(piece: str) -> bytes | None:
    """Reads a piece; None if a character is not of the alphabet."""
    return bytes(map(BYTES.__getitem__, piece)) if BYTES.keys() >= set(piece) else None
