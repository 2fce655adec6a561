"""Linear maps that replace removed layers: fits them, measures them, keeps those that help, and can undo them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from hf_cod.analysis.evaluation.choice import find_metric
from hf_cod.analysis.evaluation.metrics import Metric
from hf_cod.analysis.evaluation.outputs import task_of_outputs
from hf_cod.compression.depth.removal_probe import RemovalProbe
from hf_cod.compression.depth.replacement import BlockReplacer, contents, put_back, put_in
from hf_cod.io.text import Batch
from hf_cod.layers.checks import check_writable
from hf_cod.layers.stack import DecoderLayers

NO_MAPS = "no linear maps replace layers: {}"


@dataclass(frozen=True)
class Maps:
    """The linear maps of a model, and the original contents of the matrices into which they are folded.

    Attributes:
        replacements: for each run of removed layers {"layers", "matrix", "explained", "used"} and, if measured, "loss".
        notes: the reasons for runs without a map.
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
        """Folds a map for each run of layers to remove into the matrix before it. The layers must still be there.

        Args:
            stack: the layers.
            removed: the layers to remove, in ascending order.
            fitting: the samples to which maps are fitted.
            measuring: other samples; a map is kept only if it lowers the loss on them. None: all maps are kept.
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
                self.notes.append(f"no linear map replaces {block}: {error}")
            else:
                self._changed.append((matrix, contents(matrix)))  # first, so that any error can undo the map
                put_in(matrix, T)
                told = {"layers": [*range(block.first, block.last + 1)], "matrix": name, "explained": explained}
                verdict = {"used": True} if judge is None else judge.verdict()
                if not verdict["used"]:
                    self._take_last_back()
                self.replacements.append({**told, **verdict})
            replacer.skip(block)

    def take_back(self) -> None:
        """Restores the original contents of the matrices."""
        while self._changed:
            self._take_last_back()

    def _take_last_back(self) -> None:
        put_back(*self._changed[-1])
        self._changed.pop()


class _Judge:
    """Measures whether maps lower the loss of the model without the removed layers, on samples not used for fitting.

    Args:
        stack: the layers.
        removed: the layers that are left out.
        batches: the samples.

    Raises:
        ValueError: the model has no loss of its own.
    """

    def __init__(self, stack: DecoderLayers, removed: list[int], batches: Sequence[Batch]) -> None:
        self._metric: Metric = find_metric(None, task_of_outputs(stack, batches))
        if self._metric.compares:
            raise ValueError(f"{type(stack.model).__name__} has no loss of its own to measure on these batches")
        self._stack, self._removed, self._batches = stack, removed, batches
        self._least = self._loss()

    def verdict(self) -> dict[str, Any]:
        """Whether the model's current loss is lower than all before it, and both losses."""
        loss = {"plain": self._least, "linear": self._loss()}
        self._least = min(loss.values())
        return {"used": loss["linear"] < loss["plain"], "loss": loss}

    def _loss(self) -> float:
        """The loss with the current contents of the model; nothing is cached between calls."""
        (found,) = RemovalProbe(self._stack, self._metric, self._batches).losses([self._removed], "measuring maps")
        return found
