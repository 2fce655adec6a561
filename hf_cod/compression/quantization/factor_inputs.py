"""What is known of the inputs of the factors of a bank of experts, which no hook observes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hf_cod.layers.experts import ExpertMatrix
from hf_cod.models.factors import LowRankExperts


class FactorInputs:
    """The sums of one factor of W_e = B_e A_e, made of those of the bank.

    A reads the inputs x of the bank: its sums are the bank's. B reads A x, whose products are A H A^T with H those of
    x; with sums of squares alone nothing is known of them. A factor that all experts share reads what all of them do.

    Args:
        part: the factor.
        sums: of the bank: `ProductsRecorder`, or `LayerStatistics`.
    """

    def __init__(self, part: ExpertMatrix, sums: Any) -> None:
        self._part, self._sums = part, sums
        self._factors: Any = part.module

    def of(self, name: str, expert: int) -> Tensor | None:
        """The products, or squares, of an expert; None if no token entered it, or if they are unknown."""
        found = [each for each in map(self._of_bank, self._readers(expert)) if each is not None]
        return sum(found[1:], found[0]) if found else None

    def count(self, name: str, expert: int) -> int:
        """The number of tokens that entered the factor."""
        return sum(self._sums.count(self._part.bank, reader) for reader in self._readers(expert))

    def _readers(self, expert: int) -> list[int]:
        """The experts that read the factor."""
        count = self._factors.experts
        return [expert] if self._part.experts == count else [*range(count)]

    def _of_bank(self, expert: int) -> Tensor | None:
        found: Tensor | None = self._sums.of(self._part.bank, expert)
        if found is None or self._part.key == "reduce":
            return found
        if found.dim() == 1:
            return None
        A = self._factors.factor("reduce", expert, found.dtype)
        return A @ found @ A.mT


def inputs_of(matrix: ExpertMatrix, sums: Any) -> Any:
    """The sums of a matrix of experts: those given, or those of a factor. None without sums."""
    return FactorInputs(matrix, sums) if sums is not None and isinstance(matrix.module, LowRankExperts) else sums
