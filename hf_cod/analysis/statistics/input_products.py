"""X^T X of the inputs of each matrix of chosen layers: the Hessian of SparseGPT and the second moments of a whitening;
together with sums of the inputs, the statistics for removing columns of a matrix.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from hf_cod.analysis.statistics.matrix_inputs import MatrixInputs, check_finite_input
from hf_cod.functional.depth import wide
from hf_cod.layers.stack import DecoderLayers

# Tokens that are converted to float32 at a time.
CHUNK = 4096


class ProductsRecorder:
    """Sums x x^T over all input tokens of each matrix, in float32 on the matrix's device.

    Matrices with the same input tensors share one sum, and experts without tokens take no memory: a layer takes 4 d^2
    bytes for each distinct input of width d. Call `start` before and `finish` after each forward pass, within
    `attached`.

    Args:
        stack: the layers.
        layers: indices of the layers to record.
    """

    def __init__(self, stack: DecoderLayers, layers: Iterable[int]) -> None:
        self._inputs = MatrixInputs(stack, layers, self._read)
        self._products: dict[tuple[str | int, int | None], Tensor] = {}
        self._tokens: Counter[tuple[str, int]] = Counter()  # of each matrix of each expert
        # Matrix -> the number of its sum. Those that had the same inputs in all passes have one number.
        self._sum_of: dict[str, int] = {}
        # The last input, the matrices that have read it, and the sums that it was added to: number -> whether new.
        self._rows = torch.empty(0, 0)
        self._readers: list[str] = []
        self._added: dict[int, bool] = {}

    def attached(self) -> AbstractContextManager[None]:
        """Adds the hooks to the modules, and removes them at the end of the block."""
        return self._inputs.attached()

    def start(self, inputs: Mapping[str, Any]) -> None:
        """Starts a batch with the inputs of the model, whose masks say which tokens are padding."""
        self._inputs.start(inputs)

    def finish(self, number: int) -> None:
        """Ends a batch: checks the sums."""
        self._part()
        names = {key: name for name, key in reversed(self._sum_of.items())}
        for (key, _), products in self._products.items():
            check_finite_input(products.diagonal(), key if isinstance(key, str) else names[key], number)

    def of(self, name: str, expert: int | None = None) -> Tensor | None:
        """(in, in): the sum of a matrix, or of one of its experts; None if it received no tokens."""
        return self._products.get((self._sum_of.get(name, name), expert))

    def count(self, name: str, expert: int) -> int:
        """The number of tokens that entered a matrix of an expert."""
        return self._tokens[name, expert]

    def _read(self, name: str, expert: int | None, rows: Tensor | None, source: str) -> None:
        if expert is not None:
            self._tokens[name, expert] += 0 if rows is None else len(rows)
            self._add(name, expert, rows)
            return
        if rows is not None:
            self._part()
            self._rows = rows
        if not len(self._rows):
            return
        if name not in self._sum_of:
            self._sum_of[name] = next((key for key, new in self._added.items() if new), self._unused())
        key = self._sum_of[name]
        if key not in self._added:
            self._added[key] = (key, None) not in self._products
            self._add(key, None, self._rows)
        self._readers.append(name)

    def _part(self) -> None:
        """Gives their own sum to the matrices that shared one with a reader of the last input and have not read it.
        A model may call a matrix once more with another input, or only in some passes.
        """
        for key in self._added:
            others = [name for name, other in self._sum_of.items() if other == key and name not in self._readers]
            if others:
                copy = self._unused()
                self._products[copy, None] = self._products[key, None].clone()
                self._add(copy, None, self._rows, sign=-1)
                self._sum_of |= dict.fromkeys(others, copy)
        self._rows, self._readers, self._added = self._rows[:0].clone(), [], {}

    def _unused(self) -> int:
        return 1 + max(self._sum_of.values(), default=-1)

    def _add(self, key: str | int, expert: int | None, rows: Tensor | None, sign: int = 1) -> None:
        if rows is None or not len(rows):
            return
        high = torch.promote_types(rows.dtype, torch.float32)
        total = self._products.get((key, expert))
        if total is None:
            total = torch.zeros(rows.shape[1], rows.shape[1], dtype=high, device=rows.device)
            self._products[key, expert] = total
        for chunk in rows.split(CHUNK):
            chunk = chunk.to(high)
            total.addmm_(chunk.mT, chunk, alpha=sign)


class MomentsRecorder(ProductsRecorder):
    """Sums [x, 1] [x, 1]^T over all input tokens of chosen matrices: products, sums, and in the corner the token count.

    Sums and squares are in float64 where the device has it, because variances are differences of them and float32 loses
    these if a channel's mean is large.

    Args:
        stack: the layers.
        layers: indices of the layers to record.
        names: the matrices.
    """

    def __init__(self, stack: DecoderLayers, layers: Iterable[int], names: Iterable[str]) -> None:
        super().__init__(stack, layers)
        self._names = frozenset(names)
        self._moments: dict[tuple[str, int | None], Tensor] = {}
        self._last: Any = None

    def of(self, name: str, expert: int | None = None) -> Tensor | None:
        """(in + 1, in + 1) in float64: the sum of a matrix; None if it received no tokens."""
        products = super().of(name, expert)
        if products is None:
            return None
        M = wide(products).clone()
        squares, sums = self._moments[name, expert]
        M.diagonal()[:-1] = squares
        M[-1, :-1] = M[:-1, -1] = sums
        return M

    def _read(self, name: str, expert: int | None, rows: Tensor | None, source: str) -> None:
        self._last = rows = self._last if rows is None else rows  # that of the matrix before, chosen or not
        if name in self._names:
            super()._read(name, expert, torch.cat([rows, rows.new_ones(len(rows), 1)], 1), name)
            for chunk in rows.split(CHUNK):
                x = wide(chunk)
                moments = torch.stack([x.square().sum(0), x.sum(0)])  # (2, in)
                known = self._moments.get((name, expert))
                self._moments[name, expert] = moments if known is None else known + moments
