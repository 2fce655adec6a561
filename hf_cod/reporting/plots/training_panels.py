"""Panels of a training history: heat maps over layers and steps, and effective depth by step."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from hf_cod.io.report import RunReport
from hf_cod.reporting.plots.colours import FAR_IS_YELLOW, INK, NEAR_IS_YELLOW

# Above this ratio between the largest and the smallest value, a linear scale shows only the largest.
LOG_RATIO = 20


def heat_map(measure: str, title: str, label: str, colours: str = FAR_IS_YELLOW) -> Callable[[Any, RunReport], None]:
    """A panel with one column per measured step, as wide as its share of the training, and one row per layer."""

    def draw(axes: Any, report: RunReport) -> None:
        history = report.results["history"]
        steps = [step for step, row in zip(history["step"], history[measure], strict=True) if row]
        rows = [[math.nan if value is None else value for value in row] for row in history[measure] if row]
        known = [value for row in rows for value in row if value > 0]
        wide = bool(known) and max(known) > LOG_RATIO * min(known)
        image = axes.pcolormesh(
            _edges(steps),
            [i - 0.5 for i in range(len(rows[0]) + 1)],
            list(zip(*rows, strict=True)),
            cmap=colours,
            norm="log" if wide else "linear",
        )
        axes.set(xlabel="step", ylabel="layer", title=title, xlim=_ends(history["step"]))
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.figure.colorbar(image, ax=axes, label=label, shrink=0.9)

    return draw


def effective_depth(axes: Any, report: RunReport) -> None:
    """Effective depth by step, and its maximum, the number of layers."""
    history = report.results["history"]
    values = [math.nan if value is None else value for value in history["effective_depth"]]
    axes.plot(history["step"], values, color=INK, marker="o", markersize=3, clip_on=False)
    axes.axhline(report.n_layers, color="black", linestyle="--", linewidth=1, label=f"all {report.n_layers} layers")
    axes.legend(loc="best", frameon=False)
    limits = {"xlim": _ends(history["step"]), "ylim": (0, 1.05 * report.n_layers)}
    axes.set(xlabel="step", ylabel="layers", title="Effective depth", **limits)
    axes.spines[["top", "right"]].set_visible(False)


def _ends(steps: list[int]) -> tuple[float, float]:
    """The x range of every panel of a history: its first and last step."""
    return (steps[0], steps[-1]) if len(steps) > 1 else (steps[0] - 0.5, steps[0] + 0.5)


def _edges(steps: list[int]) -> list[float]:
    """Borders of the columns: half-way between neighbouring steps; none lies outside of the measured steps."""
    first, last = _ends(steps)
    return [first, *((a + b) / 2 for a, b in pairwise(steps)), last]


# Measure of a history -> function that plots it.
TRAINING_PANELS: dict[str, Callable[..., None]] = {
    "effective_depth": effective_depth,
    # Reversed colours: yellow means near, as in all plots of angles.
    "angular_distance": heat_map(
        "angular_distance", "Angular distance to the next layer", "d(x$^l$, x$^{l+1}$), yellow: near", NEAR_IS_YELLOW
    ),
    "gradient_norm": heat_map("gradient_norm", "Gradient norm", "‖∂L/∂θ$_l$‖"),
    "variance": heat_map("variance", "Output variance", "variance"),
}
