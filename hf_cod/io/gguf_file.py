"""GGUF files that hold float32 tensors, such as the importance matrices of llama.cpp; models are read by transformers.

The reader of the gguf package trusts the counts in a file; this one checks each of them against the file's size.
Little-endian, format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_cod.io.files import write_aside
from hf_cod.io.reading import naming_file, read_bytes
from hf_cod.io.schema import brief

MAGIC, VERSION, READABLE = b"GGUF", 3, (2, 3)
ALIGNMENT, ALIGNMENT_KEY = 32, "general.alignment"
MOST_DIMENSIONS = 4
# Number of a type of value -> its format in `struct`.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_UINT32, _STRING, _ARRAY = 4, 8, 9
_FLOAT32 = 0  # of a tensor

Value = int | float | bool | str | list[Any]


@dataclass(frozen=True)
class GgufFile:
    """The content of a GGUF file.

    Attributes:
        keys: name -> value.
        tensors: name -> float32 tensor; dimensions in the order of torch, the last one contiguous.
    """

    keys: Mapping[str, Value]
    tensors: Mapping[str, NDArray[np.float32]]


def read_gguf(path: str | Path, field: str) -> GgufFile:
    """Reads a GGUF file of float32 tensors.

    Args:
        path: the file.
        field: the field name at the start of errors.

    Raises:
        ValueError: no such file, another kind of file, a size or position outside of the file, a repeated name, or a
            tensor of another type.
    """
    raw = read_bytes(path, field)
    with naming_file(path):
        return _Reader(raw, field).read()


def write_gguf(path: str | Path, keys: Mapping[str, Value], tensors: Mapping[str, NDArray[np.float32]]) -> Path:
    """Writes a GGUF file atomically; values of keys are strings, counts (uint32), or lists of strings."""
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(keys))]
    parts += [_text(name) + _value(value) for name, value in keys.items()]
    offset = 0
    for name, tensor in tensors.items():
        dimensions = tensor.shape[::-1]  # GGUF has the contiguous one first
        parts += [_text(name), struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, _FLOAT32, offset)]
        offset += tensor.nbytes + -tensor.nbytes % ALIGNMENT
    parts.append(bytes(-sum(map(len, parts)) % ALIGNMENT))
    for tensor in tensors.values():
        parts += [tensor.astype("<f4").tobytes(), bytes(-tensor.nbytes % ALIGNMENT)]
    return write_aside(path, lambda file: [file.write(part) for part in parts])


def require_gguf(what: str) -> Any:
    """The gguf package.

    Raises:
        ImportError: it is not installed; says what requires it, and how to install it.
    """
    try:
        import gguf
    except ImportError as error:
        raise ImportError(f"model: {what} requires the gguf package: pip install 'hf_cod[gguf]'") from error
    return gguf


class _Reader:
    """Reads one file from its bytes, each of which is read once."""

    def __init__(self, raw: bytes, field: str) -> None:
        self._raw, self._field, self._place = raw, field, 0

    def read(self) -> GgufFile:
        if self._raw[: len(MAGIC)] != MAGIC:
            raise ValueError(f"{self._field}: expected a GGUF file, got one that begins with {brief(self._raw[:4])}")
        self._place = len(MAGIC)
        (version,) = self._take("I")
        if version not in READABLE:
            raise ValueError(f"{self._field}: expected GGUF version 2 or 3, little-endian, got {version}")
        tensors, keys = self._take("QQ")
        found: dict[str, Value] = {}
        for _ in range(self._count(keys, 12)):
            name = self._once(self._string(), found)
            found[name] = self._value(*self._take("I"))
        return GgufFile(found, self._tensors(tensors, found.get(ALIGNMENT_KEY, ALIGNMENT)))

    def _tensors(self, count: int, alignment: Value) -> dict[str, NDArray[np.float32]]:
        if type(alignment) is not int or not 0 < alignment <= len(self._raw):
            raise ValueError(f"{self._field}: expected {ALIGNMENT_KEY} within the file, got {brief(alignment)}")
        placed: dict[str, tuple[tuple[int, ...], int]] = {}
        for _ in range(self._count(count, 24)):
            name = self._once(self._string(), placed)
            (dimensions,) = self._take("I")
            if not 0 < dimensions <= MOST_DIMENSIONS:
                raise ValueError(f"{name}: expected 1 to {MOST_DIMENSIONS} dimensions, got {dimensions}")
            shape = self._take(f"{dimensions}Q")[::-1]
            kind, offset = self._take("IQ")
            if kind != _FLOAT32:
                raise ValueError(f"{name}: expected float32 (GGUF type {_FLOAT32}), got GGUF type {kind}")
            placed[name] = shape, offset
        start = self._place + -self._place % alignment
        return {name: self._data(name, shape, start + offset) for name, (shape, offset) in placed.items()}

    def _data(self, name: str, shape: tuple[int, ...], start: int) -> NDArray[np.float32]:
        count = math.prod(shape)
        if start + 4 * count > len(self._raw):
            raise ValueError(
                f"{name}: expected a tensor within the file of {len(self._raw):,} bytes, got shape {shape} at {start:,}"
            )
        return np.frombuffer(self._raw, "<f4", count, start).reshape(shape)

    def _value(self, kind: int) -> Value:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            inner, count = self._take("IQ")
            if inner == _ARRAY:  # no file of llama.cpp has lists of lists, which could be nested without end
                raise ValueError(f"{self._field}: expected lists of plain values, got a list of lists")
            return [self._value(inner) for _ in range(self._count(count, 1))]
        if kind not in _NUMBERS:
            raise ValueError(f"{self._field}: expected a GGUF type of value, got {kind}")
        (value,) = self._take(_NUMBERS[kind])
        return value  # type: ignore[no-any-return]

    def _string(self) -> str:
        (length,) = self._take("Q")
        (raw,) = self._take(f"{self._count(length, 1)}s")
        try:
            return bytes(raw).decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{self._field}: expected text in UTF-8, got {error}") from error

    def _once(self, name: str, known: Mapping[str, Any]) -> str:
        if name in known:
            raise ValueError(f"{self._field}: expected each name once, got {brief(name)} twice")
        return name

    def _count(self, count: int, least: int) -> int:
        """A count of things of at least so many bytes, which must fit in the rest of the file."""
        if count * least > len(self._raw) - self._place:
            raise ValueError(f"{self._field}: expected a complete GGUF file, got one that ends before {count} entries")
        return count

    def _take(self, format: str) -> tuple[Any, ...]:
        size = struct.calcsize(f"<{format}")
        if size > len(self._raw) - self._place:
            raise ValueError(f"{self._field}: expected a complete GGUF file, got one cut off at byte {len(self._raw)}")
        values = struct.unpack_from(f"<{format}", self._raw, self._place)
        self._place += size
        return values


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Value) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    if isinstance(value, list):
        return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_text, value))
    return struct.pack("<II", _UINT32, int(value))
