"""Plot of a plan of `fit`: loss by size."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.transforms import Bbox

from hf_cod.io.report import RunReport
from hf_cod.reporting.plots.colours import INK, PALE
from hf_cod.reporting.plots.names import literal

CHOSEN = "chosen plan"
# Label -> marker of a measured combination, the one in front first.
MARKS: dict[str, dict[str, Any]] = {
    CHOSEN: {"marker": "*", "markersize": 14, "color": INK, "zorder": 3},
    "several methods, measured": {"marker": "D", "color": INK},
    "one method, measured": {"marker": "o", "color": PALE},
}
# A mark whose centre is at most this far from that of the star is covered by it, in points.
COVERED = 5
# Places of a label beside its mark, in points; the first free one is used.
PLACES = ((4, 4, "left", "bottom"), (4, -4, "left", "top"), (-4, 4, "right", "bottom"), (-4, -4, "right", "top"))


def trade_off(axes: Axes, report: RunReport) -> None:
    """Loss by share of weights kept: lowest expected loss (interpolated), measured combinations, and the chosen plan.

    A name that would overlap an earlier one in all places is left out, and so is the mark in the legend if the star
    covers all of its kind.
    """
    plan = report.results["plan"]
    if plan["curve"]:  # empty for a model that meets the budget without compression
        left, loss, _ = zip(*plan["curve"], strict=True)
        axes.plot(left, loss, color=PALE, linestyle=":", label="lowest expected loss, not measured")
    rows = sorted(plan["tried"], key=lambda row: row["steps"] != plan["steps"])
    marks = [_mark_of(row["steps"], plan["steps"]) for row in rows]
    lines = [
        axes.plot(row["left"], row["loss"], linestyle="none", **MARKS[mark])[0]
        for row, mark in zip(rows, marks, strict=True)
    ]
    axes.axhline(plan["intact_loss"], color="black", linestyle="--", linewidth=1, label="intact model")
    axes.set(
        xlabel="share of the layers' weights (or bits) that is kept",
        ylabel="loss in nats per token",
        title="Trade-off between size and loss",
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.figure.draw_without_rendering()  # type: ignore[union-attr]  # from here on distances on the page are known
    for mark, index in _visible(axes, rows, marks).items():
        lines[index].set_label(mark)
    _name(axes, rows)
    axes.legend(frameon=False)


def _mark_of(steps: dict[str, float], chosen: dict[str, float]) -> str:
    """Label of a measured combination."""
    if steps == chosen:
        return CHOSEN
    return "one method, measured" if len(steps) == 1 else "several methods, measured"


def _visible(axes: Axes, rows: list[dict[str, Any]], marks: list[str]) -> dict[str, int]:
    """For each kind of mark that is visible, the index of one row that has it."""
    places: Any = axes.transData.transform([(row["left"], row["loss"]) for row in rows]) if rows else []
    star = next((place for place, mark in zip(places, marks, strict=True) if mark == CHOSEN), None)
    reach = COVERED * axes.figure.dpi / 72
    found: dict[str, int] = {}
    for index, (place, mark) in enumerate(zip(places, marks, strict=True)):
        if mark == CHOSEN or star is None or float(((place - star) ** 2).sum()) > reach**2:
            found.setdefault(mark, index)
    return found


def _name(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """Puts the names of combinations beside their marks, where they overlap no earlier name."""
    taken: list[Bbox] = []
    for row in rows:
        name = literal(" + ".join(row["steps"])) or "intact"
        for x, y, horizontal, vertical in PLACES:
            text = axes.annotate(
                name, (row["left"], row["loss"]), (x, y), textcoords="offset points", ha=horizontal, va=vertical
            )
            box = text.get_window_extent().expanded(1, 1.2)  # a title that follows makes the panel a bit lower
            if not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            text.remove()
