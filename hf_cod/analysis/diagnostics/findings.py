"""Findings of a report of `diagnose` in sentences."""

from __future__ import annotations

from typing import Any

import torch

from hf_cod.analysis.diagnostics.generation_results import generation_summary
from hf_cod.analysis.diagnostics.intervals import LEAST_SAMPLES
from hf_cod.analysis.diagnostics.more_findings import more_summary
from hf_cod.functional.depth import late_share
from hf_cod.io.report import RunReport, format_number


def summarize(report: RunReport) -> list[str]:
    """One sentence for each measure that the report holds."""
    sentences = []
    if "effective_depth" in report.results:
        sentences += [_effective_depth(report), _late_share(report.results["late_share"])]
    sentences += _idle_layers(report)
    if "layer_drop" in report.layers:
        sentences.append(_layer_drop(report))
    if "generation" in report.results:
        sentences += generation_summary(report.results["generation"], report.layers)
    if "gradient_norm" in report.layers:
        share = float(late_share(torch.tensor(report.layers["gradient_norm"])))
        sentences.append(f"The late half of the layers has {share:.0%} of the summed gradient norms.")
    if "variance" in report.layers:
        variance = report.layers["variance"]
        sentences.append(
            f"Output variance is {format_number(variance[0])} after the first layer and "
            f"{format_number(variance[-1])} after the last."
        )
    return sentences + more_summary(report)


def _effective_depth(report: RunReport) -> str:
    found: dict[str, Any] = report.results["effective_depth"]
    interval = f"no interval from fewer than {LEAST_SAMPLES} samples"
    if found["low"] is not None:
        interval = f"{found['confidence']:.0%} interval {found['low']:.1f} to {found['high']:.1f}"
    return f"Effective depth {found['value']:.1f} of {report.n_layers} layers ({interval})."


def _idle_layers(report: RunReport) -> list[str]:
    """A sentence on layers that turn the hidden state by no more than rounding can, if there are any."""
    resolution = report.results.get("idle_below", -1)  # earlier reports lack it
    idle = [
        i
        for i, angle in enumerate(report.layers.get("angular_distance", []))
        if angle is not None and angle <= resolution
    ]
    precision = "the hidden state by more than the precision of its dtype"
    if not idle:
        return []
    if len(idle) == report.n_layers:
        return [f"No layer turns {precision}, so there is no effective depth."]
    return [f"{len(idle)} of {report.n_layers} layers do not turn {precision}: {layer_ranges(idle)}."]


def layer_ranges(layers: list[int]) -> str:
    """Layer numbers in ascending order, such as "3 to 6, 9"."""
    starts = [i for i in layers if i - 1 not in layers]
    ends = [i for i in layers if i + 1 not in layers]
    return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in zip(starts, ends, strict=True))


def _late_share(share: float) -> str:
    return (
        f"The late half of the layers has {share:.0%} of the summed angular distances "
        "(50% if all layers contribute equally)."
    )


def _layer_drop(report: RunReport) -> str:
    drop: dict[str, Any] = report.results["layer_drop"]
    sign = 1 if drop["lower_is_better"] else -1
    # Sorted by the damage of removal, the largest first.
    measured = [i for i, value in enumerate(report.layers["layer_drop"]) if value is not None and value == value]
    order = sorted(measured, key=lambda i: -sign * report.layers["layer_drop"][i])
    if not order:
        return f"Without any single layer, {drop['metric']} is not a number."
    named = max(1, min(3, len(order) // 2))  # no layer is listed twice
    most = ", ".join(str(i) for i in order[:named])
    least = ", ".join(str(i) for i in reversed(order[-named:]))
    worst, best = (format_number(drop["without"][order[end]]) for end in (0, -1))
    name, intact = drop["metric"].replace("_", " "), format_number(round(drop["intact"], 6))
    if not drop["lower_is_better"] and drop["intact"] == 0:
        return f"The intact model's {name} is 0, so the removal of a layer cannot lower it."
    harm = [sign * report.layers["layer_drop"][i] for i in order]
    some = len(order) < len(report.layers["layer_drop"])
    if harm[0] == harm[-1]:
        which = "each of the measured layers" if some else "each single layer"
        return f"The removal of {which} has the same effect: {name} changes from {intact} to {worst}."
    if harm[0] <= 0:
        which = "None of the measured removals" if some else "No single removal"
        return f"{which} is harmful: {name} is {intact} with all layers, {worst} to {best} without one."
    better = _helpful(sorted(i for i, value in zip(order, harm, strict=True) if value < 0))
    layers = "layer" if named == 1 else "layers"
    which = "one of the measured layers" if some else "one layer"
    return (
        f"Removing {which} is most harmful for {layers} {most} and least for {layers} {least}: {name} changes from "
        f"{intact} to {worst} and {best}.{better}"
    )


def _helpful(layers: list[int]) -> str:
    """A sentence, after a space, on the layers whose removal improves the model; empty if there are none."""
    if len(layers) > 2:
        return f" It improves if any single one of {len(layers)} layers is removed: {layer_ranges(layers)}."
    return f" It improves if layer {' or layer '.join(map(str, layers))} is removed." if layers else ""
