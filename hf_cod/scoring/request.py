"""The inputs of a scoring method, and what several methods read from them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hf_cod.analysis.statistics.layer_statistics import LayerStatistics, collect_statistics
from hf_cod.io.text import Batch
from hf_cod.layers.stack import DecoderLayers
from hf_cod.scoring.settings import ScoreSettings

# Number of samples for sensitivity, kl and auto.
PROBE_SAMPLES = 4
# Cost of what has no gradient, or makes no difference.
TINY = 1e-30


@dataclass(frozen=True)
class Request:
    """The inputs of a method."""

    model: nn.Module
    stack: DecoderLayers
    statistics: LayerStatistics | None
    batches: Sequence[Batch] | None
    settings: ScoreSettings
    show_progress: bool
    journal: str | Path | None = None  # a directory
    found: dict[str, Any] = field(default_factory=dict)  # results of a method in addition to its scores

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of functions that measure."""
        return {"layers_path": self.settings.layers_path, "show_progress": self.show_progress}


def statistics_of(request: Request) -> LayerStatistics:
    """The given statistics, or statistics of the batches."""
    statistics = request.statistics
    if statistics is None:
        if not request.batches:
            method = request.settings.method
            raise ValueError(f"statistics: expected statistics, batches, or tokenizer and texts for {method}, got none")
        statistics = collect_statistics(request.model, request.batches, **request.options)
    statistics.check(request.stack)
    return statistics


def seen_matrices(
    stack: DecoderLayers, statistics: LayerStatistics, index: int, names: Collection[str] | None = None
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, W, s) of each matrix that received tokens; experts without tokens are left out.

    Args:
        stack: the layers.
        statistics: of the model.
        index: of the layer.
        names: the matrices; None: all of the layer.
    """
    for name, W in stack.matrices(index):
        if names is not None and name not in names:
            continue
        s, tokens = statistics.squares[name].sqrt(), statistics.tokens[name]
        if W.dim() == 2:
            if tokens:
                yield name, W, s
            continue
        for expert in tokens.nonzero().flatten().tolist():
            yield f"{name}.{expert}", W[expert], s[expert]
