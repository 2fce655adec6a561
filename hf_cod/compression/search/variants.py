"""The matrices of a model at each value of a plan, computed once and exchanged in place."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from hf_cod.analysis.statistics.layer_statistics import LayerStatistics
from hf_cod.functional import codebook
from hf_cod.functional.bits import BITS
from hf_cod.functional.sparsity import zero_counts
from hf_cod.layers.stack import DecoderLayers
from hf_cod.scoring.settings import CODEBOOK

Rounding = tuple[Mapping[str, Sequence[int]], Callable[[Tensor, int, "Tensor | None"], Tensor]]


class Variants:
    """Pruned or rounded matrices, which are put in the place of the model's own.

    For zeros, memory holds the rank of each weight among those that it is compared with: two bytes (Wanda) or four
    (magnitude) per weight for all sparsities together. For bits it holds the matrices in each width. In addition
    to these, it holds a copy of the intact matrices.

    Args:
        stack: the layers, whose weights are in memory and plain.
        names: of the matrices.
        pruner: one of `scoring.settings.PRUNERS`.
        statistics: of the intact model; None for magnitude.
        rounding: for widths beside three and four bits: name of each matrix -> its widths, and
            (matrix, width, squares) -> the rounded matrix.
        outside: matrices outside of the layers, such as the embedding: name -> weight (out, in).
    """

    def __init__(
        self,
        stack: DecoderLayers,
        names: Collection[str],
        pruner: str,
        statistics: LayerStatistics | None,
        rounding: Rounding | None = None,
        outside: Mapping[str, Tensor] | None = None,
    ) -> None:
        widths, rounded = rounding or (dict.fromkeys(names, BITS), codebook.rounded)
        self._weights: dict[str, Tensor] = {}
        self._layers: dict[str, int] = {}
        for index in range(len(stack)):
            for name, W in stack.matrices(index):
                if name in names:
                    self._weights[name], self._layers[name] = W, index
        outside = outside or {}
        # The intact model's last layer runs with its head, so both are restored together.
        self._weights |= outside
        self._layers |= dict.fromkeys(outside, len(stack) - 1)
        self._intact = {name: W.clone() for name, W in self._weights.items()}
        self._values: dict[str, float | None] = dict.fromkeys(self._weights)
        self._ranks: dict[str, list[Tensor]] = {}
        self._rounded: dict[tuple[str, float], Tensor] = {}
        for name, W in self._weights.items():
            sums = None if name in outside else statistics
            squares = [None if sums is None else sums.of(name, expert) for expert, _ in _matrices(W)]
            if pruner == CODEBOOK:
                for bits in widths[name]:
                    found = [rounded(m, bits, s) for (_, m), s in zip(_matrices(W), squares, strict=True)]
                    self._rounded[name, bits] = torch.stack(found).view(W.shape)
            else:
                rows = [None if pruner == "magnitude" else s for s in squares]
                self._ranks[name] = [_ranks(m, s) for (_, m), s in zip(_matrices(W), rows, strict=True)]

    @property
    def bytes(self) -> int:
        """The number of bytes beside the model."""
        ranks = [rank for found in self._ranks.values() for rank in found]
        return sum(t.numel() * t.element_size() for t in (*ranks, *self._rounded.values(), *self._intact.values()))

    @torch.no_grad()
    def put(self, values: Mapping[str, float | None]) -> None:
        """Changes these matrices to their values, sparsities or bits; None restores a matrix."""
        for name, value in values.items():
            if self._values[name] == value:
                continue
            W = self._weights[name]
            if value is None:
                W.copy_(self._intact[name])
            elif (name, value) in self._rounded:
                W.copy_(self._rounded[name, value])
            else:
                W.copy_(self._intact[name])
                for (_, matrix), rank in zip(_matrices(W), self._ranks[name], strict=True):
                    matrix.masked_fill_(_lowest(rank, matrix.shape, value), 0)
            self._values[name] = value

    def of_layer(self, index: int) -> dict[str, float | None]:
        """The values that the matrices of a layer have."""
        return {name: value for name, value in self._values.items() if self._layers[name] == index}

    def restore(self) -> None:
        """Restores all matrices."""
        self.put(dict.fromkeys(self._weights))


def _matrices(W: Tensor) -> list[tuple[int | None, Tensor]]:
    """(expert, matrix) of a bank; of another matrix (None, itself)."""
    return [(None, W)] if W.dim() == 2 else [(expert, W[expert]) for expert in range(len(W))]


def _ranks(W: Tensor, squares: Tensor | None) -> Tensor:
    """The rank of each weight within its row by |W_ij| ||X_j||, or without `squares` within the matrix by |W_ij|: a
    matrix of the sparsity S loses those below the number of zeros. Of equal weights the first has the lower rank.
    """
    A = W.to(torch.promote_types(W.dtype, torch.float32)).abs()
    A = A.flatten()[None] if squares is None else A * squares.sqrt().to(A)
    order = A.argsort(dim=1, stable=True)
    dtype = torch.int16 if A.shape[1] <= torch.iinfo(torch.int16).max else torch.int32
    places = torch.arange(A.shape[1], dtype=dtype, device=A.device).expand_as(order)
    return torch.empty_like(order, dtype=dtype).scatter_(1, order, places)


def _lowest(rank: Tensor, shape: torch.Size, S: float) -> Tensor:
    counts = zero_counts(len(rank), rank.shape[1], S).to(rank.device)
    return (rank < counts[:, None]).view(shape)
