"""Importance matrices of llama.cpp (imatrix.gguf): the sums of LayerStatistics under the names of GGUF.

A file has two float32 tensors for each matrix: `NAME.in_sum2`, the sum over tokens of x_j^2, (1, in) or (experts, in),
and `NAME.counts`, the number of tokens, (1, 1) or (experts, 1). `llama-quantize --imatrix` reads it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_cod._version import __version__
from hf_cod.io.display import named
from hf_cod.io.gguf_file import GgufFile, read_gguf, write_gguf
from hf_cod.io.schema import brief
from hf_cod.layers.gguf_names import gguf_names, with_same_input
from hf_cod.layers.stack import DecoderLayers

logger = logging.getLogger(__name__)

SUFFIX = ".gguf"
SUMS, COUNTS = ".in_sum2", ".counts"
# Tokens that llama.cpp counts as one chunk by default; the statistics do not keep the length of samples.
CHUNK_SIZE = 512

Sums = tuple[dict[str, Tensor], dict[str, Tensor]]
"""(squares, tokens) of `LayerStatistics`."""


def write_imatrix(
    path: str | Path, stack: DecoderLayers, squares: Mapping[str, Tensor], tokens: Mapping[str, Tensor]
) -> Path:
    """Writes the sums; logs a warning that names matrices without a name in GGUF.

    Raises:
        ValueError: no matrix has a name in GGUF, or a sum exceeds the range of float32.
    """
    names, entries = gguf_names(stack), dict[str, dict[int | None, str]]()
    for name in squares:
        for tensor, expert in names[name]:
            entries.setdefault(f"{tensor}.weight", {})[expert] = name
    unknown = [name for name in squares if not names[name]]
    if not entries:
        raise ValueError(f"model: expected matrices with names in GGUF, got none: {named(unknown)}")
    if unknown:
        logger.warning("imatrix: %d matrices have no name in GGUF and are left out: %s", len(unknown), named(unknown))
    tensors: dict[str, NDArray[np.float32]] = {}
    for entry, parts in entries.items():
        order = sorted(parts, key=lambda expert: expert or 0)
        sums = torch.stack([squares[parts[expert]] for expert in order]).flatten(0, -2)
        if not sums.float().isfinite().all():
            raise ValueError(f"{entry}: expected sums of squares within float32, got {float(sums.max()):.4g}")
        counts = torch.stack([tokens[parts[expert]] for expert in order]).view(-1, 1)
        tensors[f"{entry}{SUMS}"] = sums.float().numpy()
        tensors[f"{entry}{COUNTS}"] = counts.float().numpy()
    most = max(int(count.max()) for count in tokens.values())
    keys: dict[str, Any] = {
        "general.type": "imatrix",
        "imatrix.datasets": [f"calibration samples of hf_cod {__version__}"],
        "imatrix.chunk_count": -(-most // CHUNK_SIZE),
        "imatrix.chunk_size": CHUNK_SIZE,
    }
    return write_gguf(path, keys, tensors)


def read_imatrix(path: str | Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Reads an importance matrix: name of a tensor ("blk.0.attn_q.weight") -> sums (n, in) float64, counts (n,) int64.

    Raises:
        ValueError: no such file, another kind of file, one half of an entry missing, or sums and counts that are
            negative, not finite, of other shapes, or (counts) not whole.
    """
    file = read_gguf(path, "statistics")
    kind = file.keys.get("general.type")
    if kind != "imatrix":
        raise ValueError(
            f"statistics: expected an importance matrix (general.type imatrix), got {brief(kind)} in {str(path)!r}"
        )
    names = dict.fromkeys(name.removesuffix(SUMS).removesuffix(COUNTS) for name in file.tensors)
    if not names:
        raise ValueError(f"statistics: expected NAME{SUMS} and NAME{COUNTS}, got no tensors in {str(path)!r}")
    return {name: _entry(file, name, path) for name in names}


def sums_of(path: str | Path, stack: DecoderLayers) -> Sums:
    """Reads the sums of each matrix of a model.

    A matrix that the file does not have by its own name has the sums of another one with the same input (query, key and
    value, fused or not; gate and up). One that has none there, either, counts as one that no token entered. A warning
    names those, and entries of the file that belong to no matrix of the layers.

    Raises:
        ValueError: as `read_imatrix`; an entry of another shape than the matrix, or no entry of the model's layers.
    """
    file, names = read_imatrix(path), gguf_names(stack)
    squares: dict[str, Tensor] = {}
    tokens: dict[str, Tensor] = {}
    used: set[str] = set()
    missing = []
    for index in range(len(stack)):
        for name, shape in stack.input_shapes(index).items():
            squares[name] = torch.zeros(shape, dtype=torch.float64)
            tokens[name] = torch.zeros(shape[:-1], dtype=torch.int64)
            same = [(f"{t}.weight", expert) for first, expert in names[name] for t in with_same_input(first)]
            entry, expert = next((found for found in same if found[0] in file), (None, None))
            used.update(f"{first}.weight" for first, _ in names[name])
            if entry is None:
                missing.append(name)
                continue
            used.add(entry)
            sums, counts = _of_expert(*file[entry], expert)
            if sums.numel() != squares[name].numel() or counts.numel() != tokens[name].numel():
                raise ValueError(
                    f"{entry}{SUMS}: expected shape {shape} as the inputs of {name}, got {tuple(sums.shape)} in "
                    f"{str(path)!r}"
                )
            squares[name].copy_(sums.view(shape))
            tokens[name].copy_(counts.view(shape[:-1]))
    _tell(path, missing, [name for name in file if name not in used], len(squares))
    return squares, tokens


def _tell(path: str | Path, missing: list[str], unused: list[str], count: int) -> None:
    """Warns of matrices without an entry, and of entries without a matrix."""
    if len(missing) == count:
        raise ValueError(f"statistics: expected entries of the model's layers, got {named(unused)} in {str(path)!r}")
    if missing:
        logger.warning("statistics: no entry for %d of %d matrices: %s", len(missing), count, named(missing))
    if unused:
        logger.warning("statistics: %d entries are of no matrix of the layers: %s", len(unused), named(unused))


def _of_expert(sums: Tensor, counts: Tensor, expert: int | None) -> tuple[Tensor, Tensor]:
    if expert is None:
        return sums, counts
    if expert >= len(sums):
        return sums[:0], counts[:0]
    return sums[expert], counts[expert : expert + 1]


def _entry(file: GgufFile, name: str, path: str | Path) -> tuple[Tensor, Tensor]:
    sums, counts = (file.tensors.get(f"{name}{suffix}") for suffix in (SUMS, COUNTS))
    if sums is None or counts is None:
        half = SUMS if sums is None else COUNTS
        raise ValueError(f"statistics: expected NAME{SUMS} and NAME{COUNTS}, got no {name}{half} in {str(path)!r}")
    if not sums.size or not counts.size or counts.size != (sums.size // sums.shape[-1]):
        raise ValueError(
            f"{name}{COUNTS}: expected one count for each row of {SUMS.lstrip('.')} {sums.shape}, got shape "
            f"{counts.shape} in {str(path)!r}"
        )
    for suffix, values in ((SUMS, sums), (COUNTS, counts)):
        whole: Any = suffix == SUMS or values == np.floor(values)
        if not (np.isfinite(values) & (values >= 0) & whole).all():
            what = "finite sums of squares" if suffix == SUMS else "counts"
            raise ValueError(
                f"{name}{suffix}: expected {what}, got {values.min():g} to {values.max():g} in {str(path)!r}"
            )
    flat = torch.from_numpy(sums.reshape(-1, sums.shape[-1]).astype(np.float64))
    return flat, torch.from_numpy(counts.reshape(-1).astype(np.int64))
