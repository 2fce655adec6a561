"""Comparison of several reports of `diagnose`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hf_cod.functional.depth import late_share
from hf_cod.io.arguments import checked
from hf_cod.io.markdown import escaped
from hf_cod.io.report import RunReport, format_interval, format_number
from hf_cod.io.report_results import check_results


@dataclass(frozen=True)
class Comparison:
    """Several runs side by side.

    Attributes:
        reports: the reports of the runs.
        labels: one name per run.
        columns: header of the summary table.
        rows: one row per figure, starting with the name of the figure.
        verdict: the main differences between the runs, in sentences.
    """

    reports: list[RunReport]
    labels: list[str]
    columns: list[str]
    rows: list[list[str]]
    verdict: list[str] = field(default_factory=list)

    @checked
    def plot(self, directory: str | Path | None = None, plot_format: str = "png") -> Any:
        """Plots one figure with a column per run; given a directory, saves it there as compare.png (or pdf, svg).

        Raises:
            ImportError: matplotlib is not installed; the message gives the pip command.
        """
        from hf_cod.reporting import plots  # requires matplotlib

        return plots.plot_comparison(self.reports, self.labels, directory, plot_format)

    def to_markdown(self, picture: str | None = "compare.png") -> str:
        """The summary table and the verdict as a Markdown page, which shows the plot `picture` unless it is None."""
        lines = ["# compare: " + " / ".join(map(escaped, self.labels)), ""]
        if picture is not None:
            lines += [f"![comparison]({picture})", ""]
        lines += ["| " + " | ".join(map(escaped, self.columns)) + " |", "|---" * len(self.columns) + "|"]
        lines += ["| " + " | ".join(map(escaped, row)) + " |" for row in self.rows]
        lines += ["", *[f"- {escaped(sentence)}" for sentence in self.verdict]]
        return "\n".join(lines).rstrip() + "\n"

    def to_html(self) -> str:
        """The runs as one interactive HTML page, linked by relative depth; see `RunReport.to_html`."""
        from hf_cod.reporting.html.page import page_of

        return page_of(self.reports, self.labels, self.verdict)


@checked
def compare(reports: Sequence[RunReport], labels: Sequence[str] | None = None) -> Comparison:
    """Compares reports of `diagnose`.

    Args:
        reports: at least two reports; the models may have different depths.
        labels: one name per report; default: the names of the models.

    Raises:
        ValueError: fewer than two reports, reports of another kind, or a wrong number of labels.
    """
    if len(reports) < 2:
        raise ValueError(f"runs: expected at least two, got {len(reports)}")
    for report in reports:
        if report.kind != "diagnose":
            raise ValueError(
                f"runs: expected reports of diagnose, got one of {report.kind} ({report.model}); measure the model by "
                "hf-cod diagnose first, which takes its directory"
            )
        check_results(report)
    names = [report.model for report in reports] if labels is None else list(labels)
    if len(names) != len(reports):
        raise ValueError(f"labels: expected {len(reports)}, one for each run, got {len(names)}")
    rows = [[title, *[figure(report) for report in reports]] for title, figure in FIGURES.items()]
    return Comparison(list(reports), names, ["", *names], rows, _verdict(reports, names))


def _verdict(reports: Sequence[RunReport], names: list[str]) -> list[str]:
    """Sentences on variance growth, effective depth, late share and removal of late layers, without a ranking."""
    sentences = []
    for title, read in VERDICTS.items():
        values = [read(report) for report in reports]
        if all(value is not None for value in values):
            told = ", ".join(f"{format_number(value)} ({name})" for value, name in zip(values, names, strict=True))
            sentences.append(f"{title}: {told}.")
    return sentences


def _growth(report: RunReport) -> float | None:
    variance = report.layers.get("variance")
    return variance[-1] / variance[0] if variance and variance[0] and variance[-1] is not None else None


def _deep_removal(report: RunReport) -> float | None:
    """Median over the late half of the layers without the last one, in per cent of the intact model's metric."""
    found = report.results.get("layer_drop")
    if not found or not found["intact"]:
        return None
    values = found["without"][report.n_layers // 2 : -1]
    known = sorted(value for value in values if value is not None and value == value)
    return 100 * (known[len(known) // 2] / found["intact"] - 1) if known else None


# Sentence of the verdict -> function that reads its value from a report.
VERDICTS = {
    "Growth of the output variance from the first to the last layer": _growth,
    "Effective depth in layers": lambda report: (report.results.get("effective_depth") or {}).get("value"),
    "The late half's share of all angular distance (0.5 if all layers contribute equally)": lambda report: (
        report.results.get("late_share")
    ),
    "Cost of removing one layer of the late half, in per cent of the metric (median)": _deep_removal,
}


def _late_share(measure: str) -> Any:
    def share(report: RunReport) -> str:
        values = report.layers.get(measure)
        if not values or any(value is None or value != value for value in values):
            return "-"
        return format_number(float(late_share(torch.tensor(values))))

    return share


def _drop(key: str) -> Any:
    def of(report: RunReport) -> str:
        found = report.results.get("layer_drop")
        if not found:
            return "-"
        worst = max if found["lower_is_better"] else min
        known = [v for v in found["without"] if v is not None and v == v]
        value = found["intact"] if key == "intact" else worst(known, default=None)
        if value is None or value != value:
            return "-"
        some = key == "without" and len(known) < len(found["without"])
        return f"{format_number(round(value, 6))} ({found['metric']}{', of the measured ones' if some else ''})"

    return of


# Figure -> function that reads it from a report.
FIGURES = {
    "layers": lambda report: str(report.n_layers),
    "effective depth": lambda report: format_interval(report.results.get("effective_depth")),
    "late half's share of angular distance": _late_share("angular_distance"),
    "late half's share of gradient norm": _late_share("gradient_norm"),
    "variance of the last layer": lambda report: format_number((report.layers.get("variance") or [None])[-1]),
    "metric of the intact model": _drop("intact"),
    "worst removal of one layer": _drop("without"),
}
