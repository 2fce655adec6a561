"""Scores of the experts of a mixture, as a heat map of layers and experts."""

from __future__ import annotations

import math

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from hf_cod.io.report import RunReport
from hf_cod.reporting.plots.colours import FAR_IS_YELLOW
from hf_cod.reporting.plots.names import literal

# Method -> label of its scores.
EXPERT_LABELS = {
    "reap": "mean of gate weight × ‖output‖",
    "router_weight": "mean gate weight over all tokens",
    "frequency": "share of tokens",
    "owl": "share of outliers",
}


def expert_scores(axes: Axes, report: RunReport) -> None:
    """Row: the experts of a layer (two sets of one layer are two rows); column: expert; grey: no token."""
    found = report.results["expert_scores"]
    widest = max(map(len, found["values"].values()))
    rows = []
    for name, values in found["values"].items():
        seen = [value if count else math.nan for value, count in zip(values, found["tokens"][name], strict=True)]
        rows.append([*seen, *[math.nan] * (widest - len(seen))])
    image = axes.imshow(rows, cmap=FAR_IS_YELLOW, aspect="auto", interpolation="nearest")
    axes.set_facecolor("lightgrey")
    labels = _labels(found["layers"])
    shown = range(0, len(labels), max(1, len(labels) // 16))
    axes.set_yticks([*shown], [labels[row] for row in shown])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    method = found["method"]
    title = f"Score of each expert: {literal(method.replace('_', ' '))}"
    axes.set(xlabel="expert (grey: no token)", ylabel="layer", title=title)
    axes.figure.colorbar(image, ax=axes, label=EXPERT_LABELS.get(method, "score"), shrink=0.9)


def _labels(layers: dict[str, int]) -> list[str]:
    """The layer of each set of experts; with the part of the layer that they are in, if a layer has several."""
    several = len({*layers.values()}) < len(layers)
    return [f"{layer} {literal(_part(name, layer))}" if several else str(layer) for name, layer in layers.items()]


def _part(name: str, layer: int) -> str:
    return name.partition(f".{layer}.")[2].partition(".")[0]
