"""Findings in words: what a person would quote from a report of `diagnose`."""

from __future__ import annotations

from typing import Any

from hf_cod.report import RunReport, format_number


def summarize(report: RunReport) -> list[str]:
    """One sentence for each measure that the report holds."""
    sentences = []
    if "effective_depth" in report.results:
        sentences += [_effective_depth(report), _late_share(report.results["late_share"])]
    if "layer_drop" in report.layers:
        sentences.append(_layer_drop(report))
    if "gradient_norm" in report.layers:
        sentences.append(_halves(report.layers["gradient_norm"], "Gradient norm, mean of the first half of the layers"))
    if "variance" in report.layers:
        variance = report.layers["variance"]
        sentences.append(
            f"Output variance is {format_number(variance[0])} behind the first layer and "
            f"{format_number(variance[-1])} behind the last."
        )
    return sentences


def _effective_depth(report: RunReport) -> str:
    found: dict[str, float] = report.results["effective_depth"]
    return (
        f"Effective depth {found['value']:.1f} of {report.n_layers} layers "
        f"({found['confidence']:.0%} interval {found['low']:.1f} to {found['high']:.1f})."
    )


def _late_share(share: float) -> str:
    return (
        f"The late half of the layers turns the hidden state by {share:.0%} of all angular distance "
        "(50% if all layers did equally much)."
    )


def _layer_drop(report: RunReport) -> str:
    drop: dict[str, Any] = report.results["layer_drop"]
    sign = 1 if drop["lower_is_better"] else -1
    # Sorted by harm, the greatest first.
    order = sorted(range(report.n_layers), key=lambda i: -sign * report.layers["layer_drop"][i])
    most = ", ".join(str(i) for i in order[:3])
    least = ", ".join(str(i) for i in reversed(order[-3:]))
    worst = format_number(drop["without"][order[0]])
    return (
        f"Removing one layer hurts most at {most} and least at {least}: {drop['metric']} goes from "
        f"{format_number(drop['intact'])} to {worst} and {format_number(drop['without'][order[-1]])}."
    )


def _halves(values: list[float], what: str) -> str:
    middle = (len(values) + 1) // 2
    first, second = values[:middle], values[middle:] or values[:middle]
    a, b = sum(first) / len(first), sum(second) / len(second)
    return f"{what}: {format_number(a)}; of the second half: {format_number(b)}."
