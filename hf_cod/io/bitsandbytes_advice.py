"""Silences a warning that bitsandbytes logs when it is imported."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

# Warns about a missing optional kernel for one token on CPUs, which is not used here.
_LOGGER = logging.getLogger("bitsandbytes.backends.cpu.ops")


@contextmanager
def advice_silenced() -> Iterator[None]:
    """For a block with the first import of bitsandbytes, also by PEFT or transformers: the import logs no warning."""
    level = _LOGGER.level
    _LOGGER.setLevel(logging.ERROR)
    try:
        yield
    finally:
        _LOGGER.setLevel(level)
