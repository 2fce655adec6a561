"""Reproducible safetensors files, with an optional checksum.

safetensors itself writes metadata in an order that varies between processes, and stores no checksum.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from hf_cod.io.files import write_aside
from hf_cod.io.reading import parse_json

METADATA, DIGEST = "__metadata__", "digest"
_PREFIX = 8  # bytes of the header's length
_READ = 1 << 20  # bytes hashed at a time


def save_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, checked: bool = False
) -> Path:
    """Writes a safetensors file atomically.

    Args:
        path: the file.
        tensors: name -> tensor.
        metadata: name -> string, for the metadata of the file.
        checked: add a checksum (SHA-256) to the metadata, which `is_whole` verifies.
    """
    content = memoryview(save(dict(tensors)))
    start = _PREFIX + int.from_bytes(content[:_PREFIX], "little")
    header, data = parse_json(bytes(content[_PREFIX:start]).decode(), "header"), content[start:]
    told = dict(sorted(metadata.items()))
    if checked:
        digest = _digest({**header, METADATA: told})
        digest.update(data)
        told[DIGEST] = digest.hexdigest()
    text = json.dumps({METADATA: told, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _PREFIX)  # so that tensors are aligned
    parts = (len(text).to_bytes(_PREFIX, "little"), text, data)
    return write_aside(path, lambda file: [file.write(part) for part in parts])


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
