"""Figures of one report, and of several reports side by side."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from hf_cod.io.files import write_aside
from hf_cod.io.report import RunReport
from hf_cod.io.settings import PLOT_FORMATS, check_choice
from hf_cod.reporting.plots.names import fonts_silenced, literal
from hf_cod.reporting.plots.panels import BY_STEP, OVERVIEW, PANELS, angular_distance, log_if_wide

DPI = 150


class Picture(Figure):
    """A figure that is displayed in notebooks without pyplot."""

    def _repr_png_(self) -> bytes:
        return _drawn(self, "png")


@fonts_silenced()
def plot_report(report: RunReport, directory: str | Path | None = None, plot_format: str = "png") -> Figure:
    """Plots a report; given a directory, saves one plot per panel there and, for several panels, an overview.

    Raises:
        ValueError: the report has no measures to plot, the format is not one of `PLOT_FORMATS`, or the directory is a
            file.
    """
    check_choice("plot_format", plot_format, PLOT_FORMATS)
    _check_directory(directory)
    there = [name for name in PANELS if _has(report, name)]
    panels = [PANELS[name] for name in OVERVIEW if name in there] or [PANELS[name] for name in there]
    if not panels:
        raise ValueError(f"report: expected measures to plot, got none in a report of {report.kind}")
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Picture(figsize=(6.2 * columns, 4.4 * rows), layout="constrained")
    for axes, draw in zip(figure.subplots(rows, columns, squeeze=False).flat, panels, strict=False):
        draw(axes, report)
    for axes in figure.axes[len(panels) : rows * columns]:
        axes.set_axis_off()
    figure.suptitle(_title(report))
    if directory is not None and len(there) == 1:
        _save(figure, Path(directory) / f"{there[0]}.{plot_format}")
    elif directory is not None:
        _save(figure, Path(directory) / f"overview.{plot_format}")
        for name in there:
            single = Figure(figsize=(6.2, 4.4), layout="constrained")
            PANELS[name](single.subplots(), report)
            single.suptitle(_shorten(report.model))
            _save(single, Path(directory) / f"{name}.{plot_format}")
    return figure


@fonts_silenced()
def plot_comparison(
    reports: Sequence[RunReport], labels: Sequence[str], directory: str | Path | None = None, plot_format: str = "png"
) -> Figure:
    """Plots several reports: one column per run, one row per measure that any run has, each row on one scale.

    Given a directory, saves the figure there as "compare".

    Raises:
        ValueError: no report has measures to plot, the format is not one of `PLOT_FORMATS`, or `directory` is a file.
    """
    check_choice("plot_format", plot_format, PLOT_FORMATS)
    _check_directory(directory)
    drawn = [name for name in PANELS if any(_has(report, name) for report in reports)]
    names = [name for name in OVERVIEW if name in drawn] or drawn
    if not names:
        raise ValueError("runs: expected measures to plot, got none in any report")
    columns = len(reports)
    figure = Picture(figsize=(5.4 * columns, 3.7 * len(names) + 0.4), layout="constrained")
    grid = figure.subplots(len(names), columns, squeeze=False)
    farthest = max(
        (v for r in reports for row in r.results.get("angular_distance", []) for v in row if v is not None),
        default=None,
    )
    for row, name in zip(grid, names, strict=True):
        for axes, report, label in zip(row, reports, labels, strict=True):
            if not _has(report, name):
                axes.set_axis_off()
                axes.text(0.5, 0.5, f"{name.replace('_', ' ')}: not measured", ha="center", transform=axes.transAxes)
            elif name == "angular_distance":
                angular_distance(axes, report, farthest)
            else:
                PANELS[name](axes, report)
            if name == names[0]:
                axes.set_title(f"{_shorten(label)}\n{axes.get_title()}")
        _share_scale(row)
    if directory is not None:
        _save(figure, Path(directory) / f"compare.{plot_format}")
    return figure


def _share_scale(row: Iterable[Axes]) -> None:
    """Gives bar plots with the same axis label one common scale, so that heights can be compared."""
    drawn = [axes for axes in row if axes.patches]
    for label in {axes.get_ylabel() for axes in drawn}:
        alike = [axes for axes in drawn if axes.get_ylabel() == label]
        heights = [bar.get_height() for axes in alike for bar in axes.patches if isinstance(bar, Rectangle)]
        for axes in alike:
            axes.set_yscale("linear")
            log_if_wide(axes, heights)
        ends = [end for axes in alike for end in axes.get_ylim()]
        for axes in alike:
            axes.set_ylim(min(ends), max(ends))


def _has(report: RunReport, name: str) -> bool:
    if "history" in report.results or name.endswith(BY_STEP):
        return name.removesuffix(BY_STEP) in report.results.get("history", ()) and name.endswith(BY_STEP)
    if name == "curve":
        return bool(report.results.get(name))
    if name == "healed":
        return report.kind == "heal"
    if name in ("expert_scores", "generation", "swap"):
        return name in report.results
    if name == "trade_off":
        return "curve" in report.results.get("plan", {})
    return name in report.layers and (name != "angular_distance" or name in report.results)


def _title(report: RunReport) -> str:
    if "history" in report.results:
        steps = report.results["history"]["step"]
        return f"{_shorten(report.model)}: steps {steps[0]} to {steps[-1]}"
    found = report.results.get("effective_depth")
    depth = f": effective depth {found['value']:.1f} of {report.n_layers} layers" if found else ""
    return _shorten(report.model) + depth


def _shorten(name: str) -> str:
    return literal(name if len(name) <= 48 else "..." + name[-45:])


@fonts_silenced()
def _drawn(figure: Any, plot_format: str) -> bytes:
    picture = BytesIO()
    figure.savefig(picture, format=plot_format, dpi=DPI)
    return picture.getvalue()


def _check_directory(directory: str | Path | None) -> None:
    if directory is not None and Path(directory).is_file():
        raise ValueError(f"directory: expected a directory, got {str(directory)!r}, which is a file")


def _save(figure: Any, path: Path) -> None:
    write_aside(path, lambda file: file.write(_drawn(figure, path.suffix[1:])))
