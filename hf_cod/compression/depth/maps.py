"""Linear maps in the place of removed layers: fitted, judged, kept where they help, and taken back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from hf_cod.analysis.evaluation.choice import find_metric
from hf_cod.analysis.evaluation.metrics import Metric
from hf_cod.compression.depth.removal_probe import RemovalProbe
from hf_cod.compression.depth.replacement import BlockReplacer, contents, put_back, put_in
from hf_cod.io.text import Batch
from hf_cod.layers.checks import check_writable
from hf_cod.layers.stack import DecoderLayers
from hf_cod.layers.task import task_of

NO_MAPS = "no linear maps in the place of layers: {}"


@dataclass(frozen=True)
class Maps:
    """What became of the maps of a model, and what the matrices held that they are folded into.

    Attributes:
        replacements: of each run of removed layers {"layers", "matrix", "explained", "used"} and, judged, "loss".
        notes: why there is none in some places.
    """

    replacements: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _changed: list[tuple[nn.Module, dict[str, Tensor]]] = field(default_factory=list, init=False)

    def put(
        self,
        stack: DecoderLayers,
        removed: list[int],
        fitting: Sequence[Batch],
        measuring: Sequence[Batch] | None = None,
    ) -> None:
        """Folds a map for each run of removed layers, which are still there, into the matrix in front of it.

        Args:
            stack: the layers.
            removed: which of them are to go, in ascending order.
            fitting: the samples that maps are fitted to.
            measuring: others: a map stays only where it lowers the loss on them; None: all stay.
        """
        try:
            check_writable(stack)
            judge = None if measuring is None else _Judge(stack, removed, measuring)
        except ValueError as error:
            self.notes.append(NO_MAPS.format(error))
            return
        replacer = BlockReplacer(stack, removed, fitting)
        for block in replacer.blocks:
            try:
                matrix, name, T, explained = replacer.fit(block)
            except ValueError as error:
                self.notes.append(f"no linear map in the place of {block}: {error}")
            else:
                self._changed.append((matrix, contents(matrix)))  # first: whatever ends the work can take it back
                put_in(matrix, T)
                told = {"layers": [*range(block.first, block.last + 1)], "matrix": name, "explained": explained}
                verdict = {"used": True} if judge is None else judge.verdict()
                if not verdict["used"]:
                    self._take_last_back()
                self.replacements.append({**told, **verdict})
            replacer.skip(block)

    def take_back(self) -> None:
        """Gives the matrices what they held."""
        while self._changed:
            self._take_last_back()

    def _take_last_back(self) -> None:
        put_back(*self._changed[-1])
        self._changed.pop()


class _Judge:
    """Whether maps lower the loss of the model without layers, on samples that no map is fitted to.

    Args:
        stack: the layers.
        removed: which of them are left out.
        batches: the samples.

    Raises:
        ValueError: a model that has no loss of its own.
    """

    def __init__(self, stack: DecoderLayers, removed: list[int], batches: Sequence[Batch]) -> None:
        self._metric: Metric = find_metric(None, task_of(stack.model, batches))
        if self._metric.compares:
            raise ValueError(f"{type(stack.model).__name__} has no loss of its own to measure on these batches")
        self._stack, self._removed, self._batches = stack, removed, batches
        self._least = self._loss()

    def verdict(self) -> dict[str, Any]:
        """Whether the model as it is now is better than all before it, and both losses."""
        loss = {"plain": self._least, "linear": self._loss()}
        self._least = min(loss.values())
        return {"used": loss["linear"] < loss["plain"], "loss": loss}

    def _loss(self) -> float:
        """With what is in the model now: nothing is kept from one call to the next."""
        (found,) = RemovalProbe(self._stack, self._metric, self._batches).losses([self._removed], "measuring maps")
        return found
