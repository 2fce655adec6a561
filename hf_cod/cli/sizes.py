"""Parsing and formatting of sizes in bytes."""

from __future__ import annotations

import re


def parse_bytes(text: str, field: str) -> int:
    """Number of bytes in "24GB" (powers of 1000), "80GiB" (powers of 1024) or a plain number.

    Raises:
        ValueError: the text is not a size; begins with `field`.
    """
    from accelerate.utils.modeling import convert_file_size_to_int  # here, because it imports torch

    size, factor = text.upper(), 1  # accelerate reads a lower-case b as bits, and does not support T
    if found := re.fullmatch(r"(.+)T(I?)B?", size):
        size, factor = f"{found[1]}G{found[2]}B", 1024 if found[2] else 1000
    try:
        return int(size) if size.isdecimal() else factor * convert_file_size_to_int(size.removesuffix("B") + "B")
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{field}: expected a size such as 24GB or 80GiB, got {text!r}") from error


def in_gigabytes(value: float) -> str:
    """A size in GB (10^9 bytes), with two or three digits."""
    gigabytes = value / 1e9
    form = ".1f" if gigabytes >= 10 else ".2f" if gigabytes >= 0.1 else ".2g"
    return f"{gigabytes:{form}}"
