"""StatisticsRecorder: sums the squares of the inputs of each matrix while a model runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from hf_cod.analysis.statistics.matrix_inputs import MatrixInputs, check_finite_input
from hf_cod.functional.depth import wide
from hf_cod.layers.stack import DecoderLayers

# Numbers that are squared at a time: 4 MiB of memory, and enough work for all threads.
CHUNK = 1 << 20


class StatisticsRecorder:
    """Sums the squares of the inputs of each matrix.

    Call `start` before and `finish` after each forward pass, within `attached`.

    Args:
        stack: the layers.
        layers: indices of the layers to record; default: all.
    """

    def __init__(self, stack: DecoderLayers, layers: Iterable[int] | None = None) -> None:
        chosen = list(range(len(stack)) if layers is None else layers)
        self._inputs = MatrixInputs(stack, chosen, self._read)
        shapes = {name: shape for i in chosen for name, shape in stack.input_shapes(i).items()}
        self.squares = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
        self.tokens = {name: torch.zeros(shape[:-1], dtype=torch.int64) for name, shape in shapes.items()}

    def attached(self) -> AbstractContextManager[None]:
        """Adds the hooks to the modules, and removes them at the end of the block."""
        return self._inputs.attached()

    def start(self, inputs: Mapping[str, Any]) -> None:
        """Starts a batch with the inputs of the model, whose masks say which tokens are padding."""
        self._inputs.start(inputs)
        self._batch: list[tuple[str, int | None, Tensor, int]] = []
        self._last: tuple[Tensor, int] = torch.zeros(0), 0

    def finish(self, number: int) -> None:
        """Ends a batch: checks it and adds it to the sums."""
        for name, expert, squares, count in self._batch:
            squares = squares.cpu().double()
            check_finite_input(squares, name, number)
            index = ... if expert is None else expert
            self.squares[name][index] += squares
            self.tokens[name][index] += count

    def of(self, name: str, expert: int | None = None) -> Tensor | None:
        """(in,): the sum of squares of a matrix, or of one of its experts; None if no token entered it."""
        return entry_of(self.squares, self.tokens, name, expert)

    def _read(self, name: str, expert: int | None, rows: Tensor | None, source: str) -> None:
        found = self._last if rows is None else (_sum_of_squares(rows), len(rows))
        if expert is None:  # experts may run between matrices that share an input
            self._last = found
        self._batch.append((name, expert, *found))


def _sum_of_squares(rows: Tensor) -> Tensor:
    """(N, in) -> (in,): in float32 within a chunk of rows, in float64 over chunks."""
    total = wide(torch.zeros(rows.shape[1], device=rows.device))
    high = torch.promote_types(rows.dtype, torch.float32)
    for chunk in rows.split(max(1, CHUNK // rows.shape[1])):
        total += chunk.to(high).square().sum(0)
    return total


def entry_of(squares: dict[str, Tensor], tokens: dict[str, Tensor], name: str, expert: int | None) -> Tensor | None:
    """(in,): the sum of squares of a matrix, or of one of its experts; None if no token entered it."""
    index = ... if expert is None else expert
    return squares[name][index] if tokens[name][index] else None
