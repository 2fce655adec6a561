"""Pictures from reports alone; the only importer of matplotlib.

Colours: viridis (readable by colour-blind people and in grey print) and one dark blue; what matters is also said by
position or text, never by colour alone. Yellow means near, as in the paper's Figure 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

from hf_cod.comparison import Comparison
from hf_cod.files import write_aside
from hf_cod.report import RunReport, format_number, standing_out
from hf_cod.training.panels import LOG_RATIO, TRAINING_PANELS

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError("plots: drawing needs matplotlib: pip install 'hf_cod[plots]'") from error

NEAR_IS_YELLOW = "viridis_r"
INK = "#26456e"
PALE = "#9fb4cc"
DPI = 150
BY_STEP = "_by_step"
INFLUENCE = "1 - cos(x$^l$, x$^{l+1}$)"
GRADIENT = "‖∂L/∂θ$_l$‖"
# Way to score -> what its scores are.
SCORE_LABELS = {
    "owl": "share of outliers D$^l$",
    "angular": "angle / π",
    "block_influence": INFLUENCE,
    "gradient_norm": GRADIENT,
    "layer_drop": "cost of removal (language models: nats a token)",
    "weight_norm": "mean of |W$_{ij}$|",
    "sensitivity": "growth of the loss, nats a token",
}
# Way to choose layers to remove -> what it says that a layer costs.
COST_LABELS = {
    "search": SCORE_LABELS["layer_drop"],
    "layer_drop": SCORE_LABELS["layer_drop"],
    "block_influence": INFLUENCE,
    "angular": "angle / π from here to behind as many layers as are removed",
}


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


def plot_comparison(comparison: Comparison, directory: str | Path | None = None) -> Figure:
    """A column for each run, a row for each measure that any of them holds; writes compare.png if given a directory."""
    drawn = [name for name in PANELS if any(_has(report, name) for report in comparison.reports)]
    names = [name for name in OVERVIEW if name in drawn] or drawn
    if not names:
        raise ValueError("runs: expected measures to draw, got none in any report")
    columns = len(comparison.reports)
    figure = Picture(figsize=(5.4 * columns, 3.7 * len(names) + 0.4), layout="constrained")
    grid = figure.subplots(len(names), columns, squeeze=False)
    farthest = max(
        (v for r in comparison.reports for row in r.results.get("angular_distance", []) for v in row if v is not None),
        default=None,
    )
    for row, name in zip(grid, names, strict=True):
        for axes, report, label in zip(row, comparison.reports, comparison.labels, strict=True):
            if not _has(report, name):
                axes.set_axis_off()
                axes.text(0.5, 0.5, f"{name.replace('_', ' ')}: not measured", ha="center", transform=axes.transAxes)
            elif name == "angular_distance":
                _angular_distance(axes, report, farthest)
            else:
                PANELS[name](axes, report)
            if name == names[0]:
                axes.set_title(f"{_shorten(label)}\n{axes.get_title()}")
    if directory is not None:
        _save(figure, Path(directory) / "compare.png")
    return figure


def _angular_distance(axes: Axes, report: RunReport, farthest: float | None = None) -> None:
    """The paper's Figure 2: column l, row n, yellow where layer l + n is near to layer l."""
    matrix = report.results["angular_distance"]
    L = len(matrix)
    image = axes.imshow(
        [[float("nan") if v is None else v for v in row] for row in zip(*matrix, strict=True)],
        origin="lower",
        cmap=NEAR_IS_YELLOW,
        vmin=0,
        vmax=farthest,
        aspect="auto",
        extent=(-0.5, L - 0.5, 0.5, L + 0.5),
        interpolation="nearest",
    )
    _whole_numbers(axes.xaxis, axes.yaxis)
    axes.set(xlabel="layer l", ylabel="subsequent layer n", title="Angular distance d(x$^l$, x$^{l+n}$)")
    axes.figure.colorbar(image, ax=axes, label="angle / π (yellow: near)", shrink=0.9)


def _layer_drop(axes: Axes, report: RunReport) -> None:
    drop = report.results["layer_drop"]
    values = _numbers(drop["without"])
    metric = drop["metric"].replace("_", " ")
    _log_if_wide(axes, values)
    _bars(axes, values, least=not drop["lower_is_better"])
    title = f"{metric.capitalize()} without each single layer"
    (intact,) = _numbers([drop["intact"]])
    if math.isfinite(intact) and drop["metric"] != "output_angle":  # an intact model's output turns by 0
        axes.axhline(intact, color="black", linestyle="--", linewidth=1)
        title += f" (dashed: intact, {format_number(intact)})"
    axes.set(ylabel=metric, title=title)


def _per_layer(measure: str, title: str, label: str) -> Callable[[Axes, RunReport], None]:
    def draw(axes: Axes, report: RunReport) -> None:
        values = _numbers(report.layers[measure])
        _log_if_wide(axes, values)
        _bars(axes, values)
        axes.set(ylabel=label, title=title)

    return draw


def _score(axes: Axes, report: RunReport) -> None:
    """Bars by layer; for OWL the layerwise outlier distribution."""
    settings, found = report.settings, report.results.get("score", {})
    method = settings.get("score") or settings["method"]
    title, label = f"Score of each layer: {method.replace('_', ' ')}", SCORE_LABELS.get(method, "score")
    if settings.get("scores"):  # scores that were given; what found them, the report does not know
        title, label = f"Score of each layer: {Path(settings['scores']).name}", "score"
    elif method == "owl":
        title = f"Layerwise outlier distribution (M = {settings['threshold']:g})"
    elif "chosen" in found:
        title += f", which chose {found['chosen']}" + (f" (λ = {found['spread']:g})" if "spread" in found else "")
        label = SCORE_LABELS.get(found["chosen"], "score")
    values = _numbers(report.layers["score"])
    _log_if_wide(axes, values)
    _bars(axes, values)
    axes.set(ylabel=label, title=title)


def _curve(axes: Axes, report: RunReport) -> None:
    """Training and, where it was measured on the way, validation loss by step."""
    axes.plot(*zip(*report.results["curve"], strict=True), color=PALE, linewidth=1, label="training")
    if report.results.get("validation"):
        axes.plot(*zip(*report.results["validation"], strict=True), color=INK, marker="o", label="validation")
        axes.legend(frameon=False)
    learnt = ": distance from the teacher" if report.kind == "heal" else ""
    axes.set(xlabel="step", ylabel="loss in nats a token", title=f"Training curve{learnt}")
    axes.spines[["top", "right"]].set_visible(False)


def _healed(axes: Axes, report: RunReport) -> None:
    """Perplexity of the student before and after, and of its teacher."""
    found = report.results["perplexity"]
    names = ("before", "after", "teacher")
    values = [found[name] if math.isfinite(found[name]) else math.nan for name in names]
    axes.bar(names, values, color=[PALE, INK, PALE])
    for place, value in enumerate(values):
        axes.text(place, value, format_number(value), ha="center", va="bottom")
    _log_if_wide(axes, values)
    share = report.results["recovered"]
    back = "" if share is None else f": {share:.0%} of the lost log-perplexity recovered"
    axes.set(ylabel="perplexity", title=f"Healing{back}")
    axes.margins(y=0.1)
    axes.spines[["top", "right"]].set_visible(False)


def _sparsity(axes: Axes, report: RunReport) -> None:
    """Share of zeros of each layer and, where the report holds it, of all weights."""
    _bars(axes, _numbers(report.layers["sparsity"]), least=True)
    title = "Sparsity of each layer"
    if "method" in report.settings:
        title += f" by {report.settings['method']}"
    if "sparsity" in report.results:
        axes.axhline(report.results["sparsity"], color="black", linestyle="--", linewidth=1)
        title += f" (dashed: {report.results['sparsity']:.1%} of all weights)"
    axes.set(ylabel="share of zeros", title=title)


def _bits(axes: Axes, report: RunReport) -> None:
    """Stored bits a weight of each layer, and of all layers together."""
    mean = report.results["bits"]
    _bars(axes, _numbers(report.layers["bits"]))
    axes.axhline(mean, color="black", linestyle="--", linewidth=1)
    axes.set(
        ylabel="stored bits a weight",
        title=f"Bits of each layer (dashed: {mean:.2f} over all weights)",
    )


def _kept(axes: Axes, report: RunReport) -> None:
    """Share of weights that each layer keeps, and of all layers together."""
    mean = report.results["kept"]
    _bars(axes, _numbers(report.layers["kept"]))
    axes.axhline(mean, color="black", linestyle="--", linewidth=1)
    axes.set(ylabel="share of weights", title=f"Weights that each layer keeps (dashed: {mean:.1%} of all)")


def _removed(axes: Axes, report: RunReport) -> None:
    """Dark the layers that were removed; as high as what the plan's criterion measured of each layer, if it did."""
    measured = "cost" in report.layers
    values = _numbers(report.layers["cost" if measured else "removed"])
    removed, criterion = report.results["removed"], report.results["criterion"]
    _log_if_wide(axes, values)
    axes.bar(range(len(values)), values, color=[INK if i in removed else PALE for i in range(len(values))])
    _finish_bars(axes, values, f"layer (dark, removed: {', '.join(map(str, removed))})")
    axes.set(ylabel=COST_LABELS.get(criterion, "removed"), title=f"Removed layers: {criterion.replace('_', ' ')}")


def _trade_off(axes: Axes, report: RunReport) -> None:
    """The least loss that is expected with each share of the layers left, and what was measured."""
    plan = report.results["plan"]
    left, loss, _ = zip(*plan["curve"], strict=True)
    axes.plot(left, loss, color=PALE, label="least expected")
    for row in plan["tried"]:
        single = len(row["steps"]) == 1
        axes.plot(row["left"], row["loss"], marker="o" if single else "D", color=PALE if single else INK)
        axes.annotate("+".join(row["steps"]), (row["left"], row["loss"]), xytext=(4, 4), textcoords="offset points")
    axes.axhline(plan["intact_loss"], color="black", linestyle="--", linewidth=1)
    axes.legend(frameon=False)
    axes.set(
        xlabel="share of the layers that is left",
        ylabel="loss in nats a token",
        title="Trade-off (dashed: intact; marks: measured)",
    )
    axes.spines[["top", "right"]].set_visible(False)


def _numbers(values: list[Any]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def _bars(axes: Axes, values: list[float], least: bool = False) -> None:
    """Bars with the three largest (or least) layers in dark and named below, to be found without counting."""
    marked = sorted(standing_out(values, 3, least)) if len(values) > 3 else []
    axes.bar(range(len(values)), values, color=[INK if i in marked else PALE for i in range(len(values))])
    named = f" (dark, the {'least' if least else 'largest'}: {', '.join(map(str, marked))})" if marked else ""
    _finish_bars(axes, values, f"layer{named}")


def _finish_bars(axes: Axes, values: list[float], label: str) -> None:
    axes.set_xlabel(label)
    _whole_numbers(axes.xaxis)
    axes.margins(x=0.01, y=0.08)
    axes.spines[["top", "right"]].set_visible(False)
    if any(value < 0 for value in values):
        axes.axhline(0, color="black", linewidth=0.8)
    if not any(values):  # NaN counts as something
        axes.set_ylim(0, 1)
        axes.text(0.5, 0.5, "0 in every layer", ha="center", transform=axes.transAxes)


def _whole_numbers(*directions: Any) -> None:
    for axis in directions:
        axis.get_major_locator().set_params(integer=True, min_n_ticks=1)


def _log_if_wide(axes: Axes, values: list[float]) -> None:
    values = [value for value in values if math.isfinite(value)]
    if values and min(values) > 0 and max(values) / min(values) > LOG_RATIO:
        axes.set_yscale("log")


# Measure -> how it is drawn.
PANELS: dict[str, Callable[..., None]] = {
    "angular_distance": _angular_distance,
    "layer_drop": _layer_drop,
    "gradient_norm": _per_layer("gradient_norm", "Gradient norm of each layer", GRADIENT),
    "block_influence": _per_layer("block_influence", "Block influence of each layer", INFLUENCE),
    "variance": _per_layer("variance", "Output variance of each layer", "variance"),
    "score": _score,
    "curve": _curve,
    "healed": _healed,
    **{name + BY_STEP: draw for name, draw in TRAINING_PANELS.items()},
    "trained": _per_layer("trained", "How often each layer trained", "optimizer steps"),
    "sparsity": _sparsity,
    "kept": _kept,
    "heads": _per_layer("heads", "Attention heads that each layer keeps", "share of heads"),
    "channels": _per_layer("channels", "MLP channels that each layer keeps", "share of channels"),
    "bits": _bits,
    "removed": _removed,
    "trade_off": _trade_off,
    "error": _per_layer("error", "Share of the outputs' energy that is lost", "mean over the layer's matrices"),
}
# The four measures of the talk; block influence says much the same as angular distance and has a picture of its own.
DEPTH = ("angular_distance", "layer_drop", "gradient_norm", "variance")
OVERVIEW = ("curve", "healed", "trained", *DEPTH, *(name + BY_STEP for name in TRAINING_PANELS))


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
