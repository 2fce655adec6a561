"""Figures of whole reports, and of several side by side."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from hf_cod.io.files import write_aside
from hf_cod.io.report import RunReport
from hf_cod.reporting.plots.panels import BY_STEP, OVERVIEW, PANELS, angular_distance

DPI = 150


class Picture(Figure):
    """A figure that shows itself in a notebook without pyplot."""

    def _repr_png_(self) -> bytes:
        return _png(self)


def plot_report(report: RunReport, directory: str | Path | None = None) -> Figure:
    """Draws what a report holds; writes a picture a panel and, if there are several, overview.png into `directory`."""
    there = [name for name in PANELS if _has(report, name)]
    panels = [PANELS[name] for name in OVERVIEW if name in there] or [PANELS[name] for name in there]
    if not panels:
        raise ValueError(f"report: expected measures to draw, got none in a report of {report.kind}")
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Picture(figsize=(6.2 * columns, 4.4 * rows), layout="constrained")
    for axes, draw in zip(figure.subplots(rows, columns, squeeze=False).flat, panels, strict=False):
        draw(axes, report)
    for axes in figure.axes[len(panels) : rows * columns]:
        axes.set_axis_off()
    figure.suptitle(_title(report))
    if directory is not None and len(there) == 1:
        _save(figure, Path(directory) / f"{there[0]}.png")
    elif directory is not None:
        _save(figure, Path(directory) / "overview.png")
        for name in there:
            single = Figure(figsize=(6.2, 4.4), layout="constrained")
            PANELS[name](single.subplots(), report)
            _save(single, Path(directory) / f"{name}.png")
    return figure


def plot_comparison(reports: Sequence[RunReport], labels: Sequence[str], directory: str | Path | None = None) -> Figure:
    """A column for each run, a row for each measure that any of them holds; writes compare.png if given a directory."""
    drawn = [name for name in PANELS if any(_has(report, name) for report in reports)]
    names = [name for name in OVERVIEW if name in drawn] or drawn
    if not names:
        raise ValueError("runs: expected measures to draw, got none in any report")
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
    if directory is not None:
        _save(figure, Path(directory) / "compare.png")
    return figure


def _has(report: RunReport, name: str) -> bool:
    if "history" in report.results or name.endswith(BY_STEP):
        return name.removesuffix(BY_STEP) in report.results.get("history", ()) and name.endswith(BY_STEP)
    if name == "curve":
        return bool(report.results.get(name))
    if name == "healed":
        return report.kind == "heal"
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
    return name if len(name) <= 48 else "..." + name[-45:]


def _png(figure: Any) -> bytes:
    picture = BytesIO()
    figure.savefig(picture, format="png", dpi=DPI)
    return picture.getvalue()


def _save(figure: Any, path: Path) -> None:
    write_aside(path, lambda file: file.write(_png(figure)))
