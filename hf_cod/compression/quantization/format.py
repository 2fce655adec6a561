"""How weights lie in storage: rows of whole blocks, and codes as bytes. Four bits are bitsandbytes' nibbles, three are
byte planes that expand to such nibbles.

Symbols: c codes (N, K), N rows; b the bytes that bitsandbytes decodes as NF4, two codes each, the first one high.

A 3-bit code c is the 4-bit code 2 c + 1 (`functional.codebook`), so the lowest bit of each nibble of b is 1 and need
not be stored. The bytes of a row are cut into four equal runs B0..B3. Three are kept, and the spare bits of their
nibbles hold the fourth:

    P_i = B_i | (B3 >> (i + 1) & 0x11),   i = 0, 1, 2         3 K / 8 bytes a row

To expand is a few operations on whole bytes: B_i = P_i | 0x11, and with q_i = P_i & 0x11

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
    """b (N, K / 2), which decodes as NF4, of planes (N, 3 K / 8)."""
    kept = planes.view(len(planes), 3, -1)
    b = planes.new_empty(len(planes), 4, kept.shape[-1])
    torch.bitwise_or(kept, _LOW, out=b[:, :3])
    spare = kept & _LOW
    b[:, 3] = spare[:, 0] << 1 | spare[:, 1] << 2 | spare[:, 2] << 3 | _LOW
    return b.flatten(1)


def stored_columns(in_features: int, block: int) -> int:
    """How long rows are in storage: whole blocks."""
    return (in_features + block - 1) // block * block


def prepared(x: Tensor, in_features: int, block: int, dtype: torch.dtype | None) -> Tensor:
    """The input, as wide as stored rows, in the dtype to multiply in: autocast's, else the chosen one, else its own.

    Raises:
        ValueError: x is not `in_features` wide.
    """
    if x.shape[-1] != in_features:
        raise ValueError(f"input: expected (..., {in_features}), got {tuple(x.shape)}")
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    missing = stored_columns(in_features, block) - in_features
    return (nn.functional.pad(x, (0, missing)) if missing else x).to(dtype or x.dtype)
