"""Reproducible safetensors files, with an optional checksum.

safetensors itself writes metadata in an order that varies between processes, and stores no checksum.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import save
from torch import Tensor

from hf_cod.io.files import write_aside
from hf_cod.io.reading import parse_json

METADATA, DIGEST = "__metadata__", "digest"
_PREFIX = 8  # bytes of the header's length
_READ = 1 << 20  # bytes hashed at a time


def save_tensors(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    *,
    checked: bool = False,
    read: Callable[[str], Tensor] | None = None,
) -> Path:
    """Writes a safetensors file atomically, one tensor at a time.

    Args:
        path: the file.
        tensors: name -> tensor.
        metadata: name -> string, for the metadata of the file.
        checked: add a checksum (SHA-256) to the metadata, which `is_whole` verifies.
        read: name -> the tensor, if those in `tensors` are on the meta device; called once for each, or twice if
            `checked`.
    """
    header, told = _header(tensors), dict(sorted(metadata.items()))
    read = read or tensors.__getitem__
    if checked:
        digest = _digest({**header, METADATA: told})
        for name in header:
            digest.update(_content(read(name), tensors[name]))
        told[DIGEST] = digest.hexdigest()
    text = json.dumps({METADATA: told, **header}, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _PREFIX)  # so that tensors are aligned

    def write(file: BinaryIO) -> None:
        file.write(len(text).to_bytes(_PREFIX, "little") + text)
        for name in header:
            file.write(_content(read(name), tensors[name]))

    return write_aside(path, write)


def _header(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """The entries of the header, in the order of safetensors: that of a file of empty tensors with these dtypes."""
    content = save({name: torch.empty(0, dtype=tensor.dtype) for name, tensor in tensors.items()})
    text = content[_PREFIX : _PREFIX + int.from_bytes(content[:_PREFIX], "little")].decode()
    header: dict[str, dict[str, Any]] = parse_json(text, "header")
    start = 0
    for name, entry in header.items():
        end = start + tensors[name].nbytes
        entry |= {"shape": list(tensors[name].shape), "data_offsets": [start, end]}
        start = end
    return header


def _content(tensor: Tensor, expected: Tensor) -> memoryview:
    """The bytes of a tensor, without a copy if it is contiguous."""
    assert (tensor.dtype, tensor.shape) == (expected.dtype, expected.shape)
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def is_whole(path: str | Path, known: set[str], of: Mapping[str, str] | None = None) -> bool:
    """Whether a file of `save_tensors` is undamaged.

    Args:
        path: the file.
        known: keys of its metadata other than the checksum. A file with only these keys was written by an earlier
            version without checksum; for it, only the size is checked.
        of: further metadata, which says what the file belongs to. A file with other values counts as damaged; one
            without these keys was written by an earlier version.
    """
    of = {} if of is None else of
    try:
        with Path(path).open("rb") as file:
            length = int.from_bytes(file.read(_PREFIX), "little")
            size = Path(path).stat().st_size - _PREFIX - length
            if size < 0:
                return False
            header = parse_json(file.read(length).decode(), "header")
            told = header[METADATA]
            expected = told.pop(DIGEST, None)
            if set(told) not in (known, known | set(of)) or any(told.get(key, of[key]) != of[key] for key in of):
                return False
            if expected is None:
                return size == max(
                    (entry["data_offsets"][1] for key, entry in header.items() if key != METADATA), default=0
                )
            digest = _digest(header)
            while part := file.read(_READ):
                digest.update(part)
            return bool(digest.hexdigest() == expected)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False


def _digest(header: dict[str, Any]) -> Any:
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode())
