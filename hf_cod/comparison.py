"""Several diagnosed runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hf_cod.functional.depth import late_share
from hf_cod.report import RunReport, format_number


@dataclass(frozen=True)
class Comparison:
    """Several runs side by side.

    Attributes:
        reports: the runs.
        labels: a name for each.
        columns: head of the summary table.
        rows: one row a figure, the figure's name first.
    """

    reports: list[RunReport]
    labels: list[str]
    columns: list[str]
    rows: list[list[str]]

    def plot(self, directory: str | Path | None = None) -> Any:
        """One figure with a column for each run; written as compare.png into `directory`.

        Raises:
            ImportError: matplotlib is missing; the message says how to add it.
        """
        from hf_cod import plots  # as RunReport.plot

        return plots.plot_comparison(self, directory)

    def to_markdown(self, picture: bool = True) -> str:
        """The summary table as a page."""
        lines = ["# compare: " + " / ".join(self.labels), ""]
        if picture:
            lines += ["![comparison](compare.png)", ""]
        lines += ["| " + " | ".join(self.columns) + " |", "|---" * len(self.columns) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        return "\n".join(lines) + "\n"


def compare(reports: Sequence[RunReport], labels: Sequence[str] | None = None) -> Comparison:
    """Puts reports of `diagnose` side by side.

    Args:
        reports: at least two; models of different depth are fine.
        labels: a name for each; default: the models' names.

    Raises:
        ValueError: fewer than two reports, reports of another kind, or not one label each.
    """
    if len(reports) < 2:
        raise ValueError(f"runs: expected at least two, got {len(reports)}")
    for report in reports:
        if report.kind != "diagnose":
            raise ValueError(f"runs: expected reports of diagnose, got one of {report.kind} ({report.model})")
    names = [report.model for report in reports] if labels is None else list(labels)
    if len(names) != len(reports):
        raise ValueError(f"labels: expected {len(reports)}, one for each run, got {len(names)}")
    rows = [[title, *[figure(report) for report in reports]] for title, figure in FIGURES.items()]
    return Comparison(list(reports), names, ["", *names], rows)


def _effective_depth(report: RunReport) -> str:
    found = report.results.get("effective_depth")
    if not found:
        return "-"
    interval = f" ({found['low']:.1f} to {found['high']:.1f})" if found["low"] is not None else ""
    return f"{found['value']:.1f}{interval}"


def _late_share(measure: str) -> Any:
    def share(report: RunReport) -> str:
        values = report.layers.get(measure)
        return format_number(float(late_share(torch.tensor(values)))) if values else "-"

    return share


def _drop(key: str) -> Any:
    def of(report: RunReport) -> str:
        found = report.results.get("layer_drop")
        if not found:
            return "-"
        worst = max if found["lower_is_better"] else min
        value = found["intact"] if key == "intact" else worst(v for v in found["without"] if v is not None and v == v)
        return f"{format_number(round(value, 6))} ({found['metric']})"

    return of


# Figure -> how it is read from a report.
FIGURES = {
    "layers": lambda report: str(report.n_layers),
    "effective depth": _effective_depth,
    "late half's share of angular distance": _late_share("angular_distance"),
    "late half's share of gradient norm": _late_share("gradient_norm"),
    "variance of the last layer": lambda report: format_number((report.layers.get("variance") or [None])[-1]),
    "metric of the intact model": _drop("intact"),
    "worst removal of one layer": _drop("without"),
}
