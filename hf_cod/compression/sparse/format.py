"""The bitmask format: one bit for each weight, and the nonzero weights, row after row.

| tensor | shape, dtype | content |
|---|---|---|
| mask | (rows, ceil(columns / 8)) uint8 | bit j % 8 of byte j // 8: whether weight j of the row is stored |
| values | (n,) of the matrix's dtype | the stored weights in row-major order |
| row_starts | (rows + 1,) int64 | index in `values` at which each row begins; the last entry is n |

Bits a weight at sparsity s: 1 + 16 (1 - s) for bfloat16, which is 0.3625 of the dense size at s = 0.7.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Rows are packed and unpacked in chunks: the intermediate byte for each weight would take much memory otherwise.
_WEIGHTS_AT_A_TIME = 1 << 22


def pack(W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(mask, values, row_starts) of a matrix (rows, columns) of any dtype.

    Negative zeros, which pruning produces (-1 * 0 is -0.0), count as zeros and are unpacked as positive zeros: products
    change by the sign of a zero at most. All other values are restored bit by bit.
    """
    kept = W != 0
    step = max(1, _WEIGHTS_AT_A_TIME // max(1, W.shape[1]))
    mask = torch.cat([_to_bits(rows) for rows in kept.split(step)]) if len(W) else _to_bits(kept)
    starts = torch.zeros(W.shape[0] + 1, dtype=torch.int64, device=W.device)
    torch.cumsum(kept.sum(1), 0, out=starts[1:])
    return mask, W[kept], starts


def unpack(mask: Tensor, values: Tensor, columns: int) -> Tensor:
    """The dense matrix (rows, columns); the inverse of `pack`."""
    dense = torch.zeros(mask.shape[0], columns, dtype=values.dtype, device=values.device)
    step = max(1, _WEIGHTS_AT_A_TIME // max(1, columns))
    start = 0
    for bits, rows in zip(mask.split(step), dense.split(step), strict=True):
        kept = _from_bits(bits, columns)
        end = start + int(kept.sum())
        rows[kept] = values[start:end]
        start = end
    return dense


def check(mask: Tensor, values: Tensor, row_starts: Tensor, columns: int, name: str) -> None:
    """Checks that the three tensors are consistent, and that the values are finite.

    Raises:
        ValueError: a check fails; begins with the `name` of the matrix.
    """
    rows, width = mask.shape[0], (columns + 7) // 8
    wrong = None
    if mask.dtype != torch.uint8 or tuple(mask.shape) != (rows, width):
        wrong = f"a mask (rows, {width}) of uint8, got {tuple(mask.shape)} of {mask.dtype}"
    elif row_starts.dtype != torch.int64 or tuple(row_starts.shape) != (rows + 1,):
        wrong = f"row_starts ({rows + 1},) of int64, got {tuple(row_starts.shape)} of {row_starts.dtype}"
    elif columns % 8 and bool((mask[:, -1] >> (columns % 8)).any()):
        wrong = f"no bits after column {columns - 1}, got some"
    else:
        counts = _count_bits(mask)
        expected = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        if not torch.equal(row_starts, expected):
            row = int((row_starts != expected).nonzero()[0])
            wrong = f"row_starts[{row}] = {int(expected[row])} as the mask counts, got {int(row_starts[row])}"
        elif len(values) != int(expected[-1]):
            wrong = f"{int(expected[-1])} values as the mask counts, got {len(values)}"
        elif not values.is_floating_point():
            wrong = f"values of floating point, got {values.dtype}"
        elif not bool(values.isfinite().all()):
            wrong = "finite values, got NaN or infinity"
    if wrong:
        raise ValueError(f"{name}: expected {wrong}; the file is damaged, or was not written by hf_cod")


def _to_bits(kept: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(kept, (0, -kept.shape[1] % 8)).view(len(kept), (kept.shape[1] + 7) // 8, 8)
    bits = padded.to(torch.uint8) << torch.arange(8, dtype=torch.uint8, device=kept.device)
    return bits.sum(-1, dtype=torch.uint8)


def _from_bits(mask: Tensor, columns: int) -> Tensor:
    bits = mask[..., None] >> torch.arange(8, dtype=torch.uint8, device=mask.device) & 1
    return bits.view(len(mask), 8 * mask.shape[1])[:, :columns].bool()


def _count_bits(mask: Tensor) -> Tensor:
    """The number of ones in each row, by sums of adjacent bits, pairs and quadruples within each byte."""
    ones = mask - (mask >> 1 & 0x55)
    ones = (ones & 0x33) + (ones >> 2 & 0x33)
    return ((ones + (ones >> 4)) & 0x0F).sum(1, dtype=torch.int64)
