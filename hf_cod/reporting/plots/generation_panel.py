"""Plot of what a model answers without each layer, beside the likelihood of right and of its own answers."""

from __future__ import annotations

import math
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from hf_cod.io.report import RunReport
from hf_cod.reporting.plots.colours import INK, PALE

# Reading -> its mark, its name in the legend, and its place beside the layer, so that intervals do not overlap.
LOSSES = {"reference_loss": ("o", "loss of reference answers", -0.12), "chain_loss": ("s", "loss of own answers", 0.12)}


def generation(axes: Axes, report: RunReport) -> None:
    """Bars: the score of generated answers without each layer. Marks, on the right scale: the rise of two losses."""
    found = report.results["generation"]
    values, intact = _finite(found["without"]["task_accuracy"]), found["intact"]["task_accuracy"]
    axes.bar(range(len(values)), values, color=PALE, label="score of generated answers")
    # Intervals are those of the change.
    bases = [value - change for value, change in zip(values, _finite(report.layers["task_accuracy"]), strict=True)]
    _intervals(axes, report, "task_accuracy", range(len(values)), bases)
    axes.axhline(intact, color="black", linestyle="--", linewidth=1)
    right = axes.twinx()
    for name, (mark, label, shift) in LOSSES.items():
        losses = _finite(report.layers[name])
        places = [layer + shift for layer in range(len(losses))]
        face = INK if mark == "o" else "white"
        right.plot(places, losses, mark, color=INK, markerfacecolor=face, markersize=4, label=label)
        _intervals(right, report, name, places, [0.0] * len(losses))
    right.set_yscale("symlog", linthresh=0.1)
    right.set_ylabel("rise of the loss in nats per token")
    axes.set(
        xlabel="layer\nthin lines: 95 % intervals of the difference, over prompts",
        ylabel="score of answers",
        title=f"Answers without each single layer (dashed: intact, {intact:.3g})",
        ylim=(0, 1.3),
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    handles = [each for one in (axes, right) for each in one.get_legend_handles_labels()[0]]
    axes.legend(handles=handles, frameon=False, fontsize="small", loc="upper right", ncols=2)
    for each in (axes, right):
        each.spines[["top"]].set_visible(False)


def _intervals(axes: Axes, report: RunReport, name: str, places: Any, bases: list[float]) -> None:
    pairs = report.results.get("intervals", {}).get(name)
    if pairs:
        low, high = ([b + e for b, e in zip(bases, _finite(ends), strict=True)] for ends in zip(*pairs, strict=True))
        axes.vlines(places, low, high, colors="black", linewidth=0.8)


def _finite(values: Any) -> list[float]:
    return [math.nan if value is None or not math.isfinite(value) else value for value in values]
