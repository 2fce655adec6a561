"""Checks of the tensors in a file of `LayerStatistics`."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hf_cod.io.schema import brief

# The bits of infinity in float64.
INFINITY = 0x7FF0_0000_0000_0000


def check_shapes(squares: dict[str, Tensor], tokens: dict[str, Tensor]) -> None:
    """Checks that each matrix has sums of squares and a count of tokens.

    Raises:
        ValueError: one of them is missing, or of another type or shape.
    """
    odd = squares.keys() ^ tokens.keys()
    if odd or not squares:
        raise ValueError(
            f"statistics: expected squares and tokens of each matrix, got only one of them for "
            f"{brief(min(odd, default=None))}"
        )
    for name, sums in squares.items():
        count = tokens[name]
        if sums.dtype is not torch.float64 or sums.dim() not in (1, 2) or not sums.numel():
            raise ValueError(f"squares/{name}: expected float64 of one or two dimensions, got {_described(sums)}")
        if count.dtype is not torch.int64 or count.shape != sums.shape[:-1]:
            raise ValueError(
                f"tokens/{name}: expected int64 of shape {tuple(sums.shape[:-1])}, got {_described(count)}"
            )


def check_values(raw: bytes, squares: dict[str, Tensor], tokens: dict[str, Tensor]) -> None:
    """Checks that sums are finite and nothing is negative. All bytes of the file are checked at once, because a check
    of each tensor takes as long as reading the file.

    Reinterpreted as integers, floats keep their sign, and finite ones are less than infinity.

    Raises:
        ValueError: a sum or a count is invalid; says of which matrix.
    """
    header = int.from_bytes(raw[:8], "little")
    bits = np.frombuffer(raw, "<i8", offset=8 + header)
    if bits.min() >= 0 and bits.max() < INFINITY:
        return
    for kind, tensors in (("squares", squares), ("tokens", tokens)):
        for name, tensor in tensors.items():
            if not (tensor.isfinite() & (tensor >= 0)).all():
                what = "finite sums of squares" if kind == "squares" else "counts"
                raise ValueError(f"{kind}/{name}: expected {what}, got {tensor.min()} to {tensor.max()}")


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"
