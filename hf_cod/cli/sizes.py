"""Parsing and formatting of sizes in bytes."""

from __future__ import annotations

import re
import sys


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


def memory_limit(text: str | None, device: str | None) -> int | None:
    """The bytes of `--max-memory`, None without it.

    Args:
        text: the option.
        device: the device of the model; None: the accelerator if there is one.

    Raises:
        ValueError: not a size, zero, another device than the CPU, or a system other than Linux.
    """
    if text is None:
        return None
    limit = parse_bytes(text, "max_memory")
    if limit <= 0:
        raise ValueError(f"max_memory: expected more than 0 bytes, got {text!r}")
    if sys.platform != "linux":
        raise ValueError(f"max_memory: expected Linux, got {sys.platform}; omit it")
    from hf_cod.io.models import best_device  # here, because it imports torch

    used = device or best_device()
    if used != "cpu":
        raise ValueError(f"max_memory: expected the device cpu, got {used}; add --device cpu")
    return limit


def in_gigabytes(value: float) -> str:
    """A size in GB (10^9 bytes), with two or three digits."""
    gigabytes = value / 1e9
    form = ".1f" if gigabytes >= 10 else ".2f" if gigabytes >= 0.1 else ".2g"
    return f"{gigabytes:{form}}"
