"""The storage format of quantized weights: rows padded to a multiple of the block, codes packed into bytes. 4-bit codes
are stored as bitsandbytes' nibbles, 3-bit codes as byte planes that expand to such nibbles.

Symbols: c codes (N, K), N rows; b the bytes that bitsandbytes decodes as NF4, two codes in each, the first in the high
nibble.

A 3-bit code c is the 4-bit code 2 c + 1 (`functional.codebook`), so the lowest bit of each nibble of b is always 1 and
is not stored. The bytes of a row are split into four equal runs B0..B3. Three are stored, and the free bits of their
nibbles hold the fourth:

    P_i = B_i | (B3 >> (i + 1) & 0x11),   i = 0, 1, 2         3 K / 8 bytes per row

The expansion is a few operations on whole bytes: B_i = P_i | 0x11, and with q_i = P_i & 0x11

    B3 = q_0 << 1 | q_1 << 2 | q_2 << 3 | 0x11
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# The lowest bit of both nibbles.
_LOW = 0x11


def pack_nibbles(c: Tensor) -> Tensor:
    """b (N, K / 2) of 4-bit codes (N, K)."""
    return c[:, 0::2] << 4 | c[:, 1::2]


def pack_planes(c: Tensor) -> Tensor:
    """The planes (N, 3 K / 8) of 3-bit codes (N, K), K a multiple of 8."""
    b = pack_nibbles(c << 1)
    runs = b.view(len(b), 4, -1)
    spare = torch.stack([runs[:, 3] >> (i + 1) & _LOW for i in range(3)], 1)
    return (runs[:, :3] | spare).flatten(1)


def expand_planes(planes: Tensor) -> Tensor:
    """b (N, K / 2) of planes (N, 3 K / 8); NF4 decodes it."""
    kept = planes.view(len(planes), 3, -1)
    b = planes.new_empty(len(planes), 4, kept.shape[-1])
    torch.bitwise_or(kept, _LOW, out=b[:, :3])
    spare = kept & _LOW
    b[:, 3] = spare[:, 0] << 1 | spare[:, 1] << 2 | spare[:, 2] << 3 | _LOW
    return b.flatten(1)


def stored_columns(in_features: int, block: int) -> int:
    """The length of a stored row: `in_features` rounded up to a multiple of `block`."""
    return (in_features + block - 1) // block * block


def prepared(x: Tensor, in_features: int, block: int, dtype: torch.dtype | None) -> Tensor:
    """The input, padded to the length of stored rows, in the compute dtype: autocast's, else `dtype`, else x's own.

    Raises:
        ValueError: the last dimension of x is not `in_features`.
    """
    if x.shape[-1] != in_features:
        raise ValueError(f"input: expected (..., {in_features}), got {tuple(x.shape)}")
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    missing = stored_columns(in_features, block) - in_features
    return (nn.functional.pad(x, (0, missing)) if missing else x).to(dtype or x.dtype)
