"""Plot of the loss of a model with layers of another one."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from hf_cod.io.report import RunReport
from hf_cod.reporting.plots.colours import INK, PALE
from hf_cod.reporting.plots.names import literal

# Part of the results -> its name in the legend, and its line.
LINES = {"bottom": ("up to layer l", "-"), "top": ("from layer l on", "--")}


def swap(axes: Axes, report: RunReport) -> None:
    """Bars: the loss with one layer of the donor. Lines: with its layers from the bottom, and from the top."""
    found = report.results["swap"]
    places = range(len(found["single"]))
    rises = [loss - found["intact"] for loss in found["single"]]
    axes.bar(places, rises, bottom=found["intact"], color=PALE, label="layer l alone")
    for part, (label, line) in LINES.items():
        axes.plot(places, found[part], line, color=INK, label=label)
    axes.axhline(found["intact"], color="black", linewidth=0.8)
    axes.set(
        xlabel="layer l of the donor",
        ylabel=literal(found["metric"].replace("_", " ")),
        title="Layers of the donor in the model (thin line: none)",
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.legend(frameon=False, fontsize="small")
    axes.spines[["top", "right"]].set_visible(False)
