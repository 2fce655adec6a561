"""Tensors in a safetensors file that is the same wherever it is written, and that tells whether it was damaged since.

safetensors writes metadata in an order that differs from process to process, and keeps no checksum.
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

METADATA, DIGEST = "__metadata__", "digest"
_PREFIX = 8  # bytes that hold the header's length
_READ = 1 << 20  # bytes that are hashed at a time


def save_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, checked: bool = False
) -> Path:
    """Writes a safetensors file, aside and renamed.

    Args:
        path: the file.
        tensors: what it holds.
        metadata: strings beside them.
        checked: add a checksum to the metadata, which `is_whole` reads.
    """
    content = memoryview(save(dict(tensors)))
    start = _PREFIX + int.from_bytes(content[:_PREFIX], "little")
    header, data = json.loads(bytes(content[_PREFIX:start])), content[start:]
    told = dict(sorted(metadata.items()))
    if checked:
        digest = _digest({**header, METADATA: told})
        digest.update(data)
        told[DIGEST] = digest.hexdigest()
    text = json.dumps({METADATA: told, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _PREFIX)  # so that tensors are aligned
    parts = (len(text).to_bytes(_PREFIX, "little"), text, data)
    return write_aside(path, lambda file: [file.write(part) for part in parts])


def is_whole(path: str | Path, known: set[str]) -> bool:
    """Whether a file of `save_tensors` is as it was written.

    Args:
        path: the file.
        known: keys of its metadata beside the checksum. A file with these alone is one that an earlier version wrote
            without checksum, and is taken for whole if its sizes are right.
    """
    try:
        with Path(path).open("rb") as file:
            length = int.from_bytes(file.read(_PREFIX), "little")
            size = Path(path).stat().st_size - _PREFIX - length
            if size < 0:
                return False
            header = json.loads(file.read(length))
            told = header[METADATA]
            expected = told.pop(DIGEST, None)
            if set(told) != known:
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
