"""The bits of matrices: one number, or one digit for each expert of a bank; and the size of what is stored."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hf_cod.compression.quantization.format import stored_columns
from hf_cod.compression.quantization.scales import NESTED_BLOCK
from hf_cod.compression.quantization.settings import StorageSettings
from hf_cod.functional.bits import BITS

Width = int | str
"""3 or 4; for a bank of experts also a string such as "3343", with a digit for each expert."""

Size = tuple[int, ...]
"""(out, in) of a matrix, or (experts, out, in) of those of a bank."""


def widths_of(bits: Width, experts: int) -> list[int]:
    """The bits of each expert."""
    return [bits] * experts if isinstance(bits, int) else [int(digit) for digit in bits]


def width_of(widths: Sequence[int]) -> Width:
    """The bits of all experts as one number if they are equal, else as digits."""
    return widths[0] if len({*widths}) == 1 else "".join(map(str, widths))


def is_width(bits: object, experts: int | None = None) -> bool:
    """Whether this is 3 or 4, or, where there are experts, a digit for each of them.

    Args:
        bits: anything.
        experts: their number; None: unknown.
    """
    if not isinstance(bits, str):
        return bits in BITS and not isinstance(bits, bool)
    return bool(bits) and {*bits} <= {*map(str, BITS)} and experts in (None, len(bits))


def code_bytes(weights: int, bits: int) -> int:
    """The number of bytes of the codes of a matrix."""
    return weights * bits // 8


def count_codes(size: Size, storage: StorageSettings) -> int:
    """The number of stored codes, which is the cost in bits of one bit more per code."""
    return math.prod(size[:-1]) * stored_columns(size[-1], storage.block)


def stored_bits(size: Size, bits: Width, storage: StorageSettings) -> int:
    """The number of bits of a matrix, or of those of a bank, in a file: codes, scales, and the scales of scales."""
    if len(size) == 3:
        return sum(stored_bits(size[1:], width, storage) for width in widths_of(bits, size[0]))
    weights = count_codes(size, storage)
    count = weights // storage.block
    nested = (count + NESTED_BLOCK - 1) // NESTED_BLOCK
    return weights * int(bits) + (8 * count + 32 * (nested + 1) if storage.double_quant else 32 * count)


def largest_width(bits: Width) -> int:
    """The most bits of an expert."""
    return int(max(str(bits)))
