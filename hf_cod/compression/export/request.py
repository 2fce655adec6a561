"""What `export` gives to a target, and what the target says about its files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_cod.analysis.statistics.layer_statistics import LayerStatistics
from hf_cod.compression.export.plan import ExportPlan, Size
from hf_cod.io.text import Batch
from hf_cod.layers.stack import DecoderLayers
from hf_cod.scoring.layer_scores import LayerScores


@dataclass(frozen=True)
class Request:
    """One export.

    Attributes:
        stack: the layers, restricted to the chosen matrices.
        plan: the width of each matrix.
        output: directory for the files.
        scores: scores of the layers; None if the plan was made without.
        statistics: statistics of the model; None without.
        batches: calibration batches; None without.
        journal: directory of finished layers; None to keep nothing.
        show_progress: show a progress bar.
        embedding_bits: width of the embedding and the head, where the engine has a choice.
        gguf: a GGUF of the model before it was narrowed; None if the engine is to read the model itself.
    """

    stack: DecoderLayers
    plan: ExportPlan
    output: Path
    scores: LayerScores | None = None
    statistics: LayerStatistics | None = None
    batches: Sequence[Batch] | None = None
    journal: str | Path | None = None
    show_progress: bool = False
    embedding_bits: int = 8
    gguf: str | None = None


@dataclass(frozen=True)
class Written:
    """What a target wrote.

    Attributes:
        summary: sentences: what the files are, and the command line that reads them.
        notes: what was left out or could be better.
        errors: matrix -> share of its outputs' energy that was lost by rounding, if it was measured.
    """

    summary: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)


def group_scaled(size: Size, width: int, group: int, scale_bits: int) -> int:
    """Bits of a matrix (out, in) of codes with a scale of `scale_bits` for each group of weights in a row."""
    rows, columns = size
    return rows * columns * width + rows * -(-columns // group) * scale_bits


def undivided(size: Size, group: int | None) -> str | None:
    """Why groups of this size do not fit a matrix (out, in); None if they do."""
    return f"its rows of {size[1]} are no multiple of {group}" if group is not None and size[1] % group else None


def by_width(values: dict[str, int]) -> dict[int, list[Any]]:
    """Width -> names of its matrices, smallest width first."""
    return {width: [name for name, of in values.items() if of == width] for width in sorted(set(values.values()))}
