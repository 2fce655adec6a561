"""The entries of a report that the card of a pre-trained model has."""

from __future__ import annotations

from dataclasses import dataclass, field

from hf_cod.io.report import Interval, RunReport
from hf_cod.io.schema import read_record
from hf_cod.models.placements import PLACEMENTS


@dataclass(frozen=True)
class _Results:
    """Entries of a report's results that the card has."""

    validation_perplexity: float = field(metadata={"nan": True})
    validation_tokens: int
    tokens: int
    parameters: int | dict[str, int]  # a number in reports of 0.1
    late_share: float | None = None
    effective_depth: Interval | None = field(default=None, metadata={"nan": True})


@dataclass(frozen=True)
class _Settings:
    """Entries of a report's settings that the card has."""

    norm_placement: str = field(metadata={"choices": PLACEMENTS})
    steps: int
    batch_size: int
    sequence_length: int
    learning_rate: float
    precision: str
    seed: int
    text: str | None = None
    validation_text: str | None = None
    validation_split: str | None = None


def check_card_entries(report: RunReport) -> None:
    """Checks the entries that the card has.

    Raises:
        ValueError: one is missing, or of another type.
    """
    results = read_record(_Results, report.results, "results", extra=True)
    read_record(_Settings, report.settings, "settings", extra=True)
    if results.effective_depth is not None and results.late_share is None:
        raise ValueError("late_share: expected a number beside effective_depth, got none")
    if report.layers and not report.layers.get("variance"):
        raise ValueError(f"layers: expected the variance among the measures, got {', '.join(report.layers)}")
