"""Sizes as people write and read them."""

from __future__ import annotations

import re

UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def parse_bytes(text: str, field: str) -> int:
    """Bytes of "24GB" (powers of 1000), "80GiB" (of 1024) or a plain number.

    Raises:
        ValueError: no size; begins with the name of the user's `field`.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text, re.IGNORECASE)
    if match is None:
        raise ValueError(f"{field}: expected a size such as 24GB or 80GiB, got {text!r}")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** UNITS[match[2].upper()])


def in_gigabytes(value: float) -> str:
    """10^9 bytes, to two or three digits."""
    gigabytes = value / 1e9
    form = ".1f" if gigabytes >= 10 else ".2f" if gigabytes >= 0.1 else ".2g"
    return f"{gigabytes:{form}}"
