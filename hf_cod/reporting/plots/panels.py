"""Plots of the measures of a report: one panel per measure."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from hf_cod.io.report import RunReport, format_number, standing_out, told_share
from hf_cod.reporting.plots.colours import INK, NEAR_IS_YELLOW, PALE
from hf_cod.reporting.plots.expert_panel import expert_scores
from hf_cod.reporting.plots.generation_panel import generation
from hf_cod.reporting.plots.names import literal
from hf_cod.reporting.plots.swap_panel import swap
from hf_cod.reporting.plots.trade_off import trade_off
from hf_cod.reporting.plots.training_panels import LOG_RATIO, TRAINING_PANELS

BY_STEP = "_by_step"
INFLUENCE = "1 - cos(x$^l$, x$^{l+1}$)"
GRADIENT = "‖∂L/∂θ$_l$‖"
RISE = "rise of the loss (language models: nats per token)"
# Scoring method -> axis label of its scores.
SCORE_LABELS = {
    "owl": "share of outliers D$^l$",
    "angular": "angle / π",
    "block_influence": INFLUENCE,
    "gradient_norm": GRADIENT,
    "layer_drop": "cost of removal (language models: nats per token)",
    "weight_norm": "mean of |W$_{ij}$|",
    "kl": "ln of the divergence, nats per token",
    "sensitivity": "increase of the loss, nats per token",
}
# Criterion for removing layers -> axis label of the cost of a layer.
COST_LABELS = {
    "search": SCORE_LABELS["layer_drop"],
    "layer_drop": SCORE_LABELS["layer_drop"],
    "block_influence": INFLUENCE,
    "angular": "angle / π across as many layers as are removed, from this layer on",
}


def angular_distance(axes: Axes, report: RunReport, farthest: float | None = None) -> None:
    """Figure 2 of arXiv 2502.05795: column l, row n; yellow: small distance between layers l and l + n."""
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
    metric = literal(drop["metric"].replace("_", " "))
    log_if_wide(axes, values)
    _bars(axes, values, least=not drop["lower_is_better"], intervals=_intervals(report, "layer_drop"))
    title = f"{metric.capitalize()} without each single layer"
    (intact,) = _numbers([drop["intact"]])
    if math.isfinite(intact) and drop["metric"] != "output_angle":  # always 0 for the intact model
        axes.axhline(intact, color="black", linestyle="--", linewidth=1)
        title += f" (dashed: intact, {format_number(intact)})"
    axes.set(ylabel=metric, title=title)


def _per_layer(measure: str, title: str, label: str) -> Callable[[Axes, RunReport], None]:
    def draw(axes: Axes, report: RunReport) -> None:
        values = _numbers(report.layers[measure])
        log_if_wide(axes, values)
        _bars(axes, values, intervals=_intervals(report, measure))
        axes.set(ylabel=label, title=title)

    return draw


def _intervals(report: RunReport, measure: str) -> list[list[float]]:
    """[low, high] over samples for each layer; empty if the report has no intervals."""
    found: list[list[float]] = report.results.get("intervals", {}).get(measure, [])
    return found


def _score(axes: Axes, report: RunReport) -> None:
    """Bars per layer; for OWL, the layerwise outlier distribution."""
    settings = report.settings
    found = report.results.get("score_settings") or report.results.get("score", {})  # the latter in reports of 0.1
    method = settings.get("score") or settings["method"]
    title, label = f"Score of each layer: {literal(method.replace('_', ' '))}", SCORE_LABELS.get(method, "score")
    if settings.get("scores"):  # scores from a file: the report does not contain their method
        title, label = f"Score of each layer: {literal(Path(settings['scores']).name)}", "score"
    elif method == "owl":
        title = f"Layerwise outlier distribution (M = {settings['threshold']:g})"
    elif "chosen" in found:
        title += f", which chose {literal(found['chosen'])}"
        title += f" (λ = {found['spread']:g})" if "spread" in found else ""
        label = SCORE_LABELS.get(found["chosen"], "score")
    values = _numbers(report.layers["score"])
    log_if_wide(axes, values)
    _bars(axes, values)
    axes.set(ylabel=label, title=title)


def _curve(axes: Axes, report: RunReport) -> None:
    """Training loss by step and, if measured during training, validation loss."""
    axes.plot(*zip(*report.results["curve"], strict=True), color=PALE, linewidth=1, label="training")
    if report.results.get("validation"):
        axes.plot(*zip(*report.results["validation"], strict=True), color=INK, marker="o", label="validation")
        axes.legend(frameon=False)
    learnt = ": distance from the teacher" if report.kind == "heal" else ""
    axes.set(xlabel="step", ylabel="loss in nats per token", title=f"Training curve{learnt}")
    axes.spines[["top", "right"]].set_visible(False)


def _healed(axes: Axes, report: RunReport) -> None:
    """Perplexity of the student before and after, and of its teacher."""
    found = report.results["perplexity"]
    names = ("before", "after", "teacher")
    values = [found[name] if math.isfinite(found[name]) else math.nan for name in names]
    axes.bar(names, values, color=[PALE, INK, PALE])
    for place, value in enumerate(values):
        axes.text(place, value, format_number(value), ha="center", va="bottom")
    log_if_wide(axes, values)
    name = "recovered_share" if "recovered_share" in report.results else "recovered"  # the latter in reports of 0.1
    share = report.results[name]
    back = "" if share is None else f": {told_share(share)} of the lost log-perplexity recovered"
    axes.set(ylabel="perplexity", title=f"Healing{back}")
    axes.margins(y=0.1)
    axes.spines[["top", "right"]].set_visible(False)


def _sparsity(axes: Axes, report: RunReport) -> None:
    """Share of zeros in each layer and, if the report has it, in all weights."""
    _bars(axes, _numbers(report.layers["sparsity"]), least=True)
    title = "Sparsity of each layer"
    if "method" in report.settings:
        title += f" by {literal(str(report.settings['method']))}"
    if "sparsity" in report.results:
        axes.axhline(report.results["sparsity"], color="black", linestyle="--", linewidth=1)
        title += f" (dashed: {report.results['sparsity']:.1%} of all weights)"
    axes.set(ylabel="share of zeros", title=title)


def _bits(axes: Axes, report: RunReport) -> None:
    """Stored bits per weight of each layer, and of all layers together."""
    mean = report.results["bits"]
    _bars(axes, _numbers(report.layers["bits"]))
    axes.axhline(mean, color="black", linestyle="--", linewidth=1)
    axes.set(
        ylabel="stored bits per weight",
        title=f"Bits of each layer (dashed: {mean:.2f} over all weights)",
    )


def _parameter_share(axes: Axes, report: RunReport, name: str = "parameter_share") -> None:
    """Share of weights that each layer keeps, and that all layers together keep."""
    mean = report.results[name]
    _bars(axes, _numbers(report.layers[name]))
    axes.axhline(mean, color="black", linestyle="--", linewidth=1)
    axes.set(ylabel="share of weights", title=f"Weights that each layer keeps (dashed: {mean:.1%} of all)")


def _removed(axes: Axes, report: RunReport) -> None:
    """Bars per layer, dark for removed layers; heights are the costs that the criterion measured, if it did."""
    measured = "cost" in report.layers
    values = _numbers(report.layers["cost" if measured else "removed"])
    removed, criterion = report.results["removed"], report.results["criterion"]
    log_if_wide(axes, values)
    axes.bar(range(len(values)), values, color=[INK if i in removed else PALE for i in range(len(values))])
    _finish_bars(axes, values, f"layer (dark, removed: {', '.join(map(str, removed))})")
    title = f"Removed layers: {literal(criterion.replace('_', ' '))}"
    axes.set(ylabel=COST_LABELS.get(criterion, "removed"), title=title)


def _numbers(values: list[Any]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def _finite(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else math.nan


def _bars(axes: Axes, values: list[float], least: bool = False, intervals: list[list[float]] | None = None) -> None:
    """Bars with the three largest (or smallest) layers in dark and listed in the axis label.

    Intervals, if given, are thin lines from the low to the high end.
    """
    marked = sorted(standing_out(values, 3, least)) if len(values) > 3 else []
    axes.bar(range(len(values)), values, color=[INK if i in marked else PALE for i in range(len(values))])
    named = f" (dark, the {'least' if least else 'largest'}: {', '.join(map(str, marked))})" if marked else ""
    if intervals:
        low, high = zip(*([_finite(end) for end in ends] for ends in intervals), strict=True)
        axes.vlines(range(len(values)), low, high, colors="black", linewidth=0.8)
        named += "\nthin lines: 95 % intervals over samples"
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


def log_if_wide(axes: Axes, values: list[float]) -> None:
    """Makes the scale logarithmic if all values are positive and max / min exceeds `LOG_RATIO`."""
    values = [value for value in values if math.isfinite(value)]
    if values and min(values) > 0 and max(values) / min(values) > LOG_RATIO:
        axes.set_yscale("log")


# Measure -> function that plots it.
PANELS: dict[str, Callable[..., None]] = {
    "angular_distance": angular_distance,
    "layer_drop": _layer_drop,
    "generation": generation,
    "gradient_norm": _per_layer("gradient_norm", "Gradient norm of each layer", GRADIENT),
    "block_influence": _per_layer("block_influence", "Block influence of each layer", INFLUENCE),
    "variance": _per_layer("variance", "Output variance of each layer", "variance"),
    "usefulness": _per_layer("usefulness", "Usefulness: a linear map in the place of each layer", RISE),
    "causal_score": _per_layer(
        "causal_score", "Causal score: what later layers add, without each layer", "relative change"
    ),
    "permutation_score": _per_layer("permutation_score", "Permutation score: each layer and the next swapped", RISE),
    "jacobian": _per_layer("jacobian", "Jacobian of each layer", "‖J$_l$ - I‖ / ‖I‖"),
    "attention_sinks": _per_layer("attention_sinks", "Attention to the first token", "share of attention"),
    "massive_ratio": _per_layer("massive_ratio", "Massive activations", "max |x| / median |x|"),
    "logit_lens": _per_layer("logit_lens", "Logit lens: the head reads each layer's output", "loss"),
    "swap": swap,
    "score": _score,
    "expert_scores": expert_scores,
    "curve": _curve,
    "healed": _healed,
    **{name + BY_STEP: draw for name, draw in TRAINING_PANELS.items()},
    "trained": _per_layer("trained", "Optimizer steps in which each layer was trained", "optimizer steps"),
    "sparsity": _sparsity,
    "parameter_share": _parameter_share,
    "kept": partial(_parameter_share, name="kept"),  # in reports of 0.1
    "share_of_heads": _per_layer("share_of_heads", "Share of attention heads that each layer keeps", "share of heads"),
    "share_of_channels": _per_layer(
        "share_of_channels", "Share of MLP channels that each layer keeps", "share of channels"
    ),
    "share_of_expert_channels": _per_layer(
        "share_of_expert_channels", "Share of the channels of its experts that each layer keeps", "share of channels"
    ),
    "bits": _bits,
    "removed": _removed,
    "runs": _per_layer("runs", "How often each layer runs", "runs"),
    "removed_token_share": _per_layer(
        "removed_token_share", "Share of the tokens' routes that lead to removed experts", "share of routes"
    ),
    "trade_off": trade_off,
    "error": _per_layer("error", "Lost share of the outputs' energy", "mean over the layer's matrices"),
}
# The main measures; block influence is similar to angular distance and is plotted separately.
DEPTH = ("angular_distance", "layer_drop", "generation", "gradient_norm", "variance")
OVERVIEW = ("curve", "healed", "trained", *DEPTH, *(name + BY_STEP for name in TRAINING_PANELS))
