"""What a change of a layer may know of its inputs: sums over tokens, recorded while the layer runs."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor


class Sums(Protocol):
    """Sums over what entered each matrix."""

    def of(self, name: str, expert: int | None = None) -> Tensor | None:
        """The sum of a matrix or of one of its experts; None if no token entered it."""


class Recorder(Sums, Protocol):
    """Makes such sums while the model runs: `start` before and `finish` after each pass, within `attached`."""

    def attached(self) -> AbstractContextManager[None]:
        """Puts hooks on the modules, and takes them away at the end of the block."""

    def start(self, mask: Tensor | None) -> None:
        """Begins a batch with its attention mask (S, T), or None."""

    def finish(self, number: int) -> None:
        """Ends a batch."""
