"""Findings of the measures on request in sentences."""

from __future__ import annotations

from typing import Any

from hf_cod.io.report import RunReport, format_number


def more_summary(report: RunReport) -> list[str]:
    """One sentence for each measure on request that the report holds, and one on their rank correlations."""
    sentences = [tell(report) for name, tell in SENTENCES.items() if name in report.layers]
    return [*sentences, *_correlations(report.results.get("rank_correlations", {}))]


def _usefulness(report: RunReport) -> str:
    found: dict[str, Any] = report.results["usefulness"]
    if found["useful_share"] is None:
        return f"A linear map in the place of a layer is most harmful for {_extreme(report, 'usefulness')}."
    useful = round(found["useful_share"] * report.n_layers)
    return (
        f"{useful} of {report.n_layers} layers are useful: a linear map in their place raises the loss by more than "
        f"{found['threshold']:.0%}."
    )


def _attention(report: RunReport) -> str:
    known = _known(report, "attention_sinks")
    most = max(known, key=lambda layer: known[layer])
    mean = sum(known.values()) / len(known)
    return (
        f"The first token gets {mean:.0%} of the attention of later tokens (mean over layers), and {known[most]:.0%} "
        f"in layer {most}."
    )


def _massive(report: RunReport) -> str:
    massive = [layer for layer, count in _known(report, "massive_activations").items() if count > 0]
    if not massive:
        return "No layer's output has massive activations."
    return f"The outputs of {len(massive)} layers have massive activations, the first that of layer {massive[0]}."


def _lens(report: RunReport) -> str:
    known = _known(report, "logit_lens")
    first, last = min(known), max(known)
    metric = report.results["logit_lens"]["metric"].replace("_", " ")
    return (
        f"The {metric} of the logit lens is {format_number(known[first])} after layer {first} and "
        f"{format_number(known[last])} after layer {last}."
    )


def _largest(name: str, words: str) -> Any:
    return lambda report: f"{words} is largest for {_extreme(report, name)}."


def _extreme(report: RunReport, name: str) -> str:
    known = _known(report, name)
    most = max(known, key=lambda layer: known[layer])
    return f"layer {most} ({format_number(known[most])})"


def _known(report: RunReport, name: str) -> dict[int, float]:
    """Layer -> its value, if it has one; a report never has a measure without any."""
    values = dict(enumerate(report.layers[name]))
    return {layer: value for layer, value in values.items() if value is not None and value == value} or {0: 0.0}


def _correlations(found: dict[str, float]) -> list[str]:
    if not found:
        return []
    order = sorted(found, key=lambda name: -found[name])
    told = ", ".join(f"{found[name]:.2f} ({name.replace('_', ' ')})" for name in order)
    return [f"Rank correlation with the harm of a layer's removal, over layers: {told}."]


# Name in the layers -> its sentence.
SENTENCES = {
    "usefulness": _usefulness,
    "causal_score": _largest("causal_score", "The change of what later layers add, without a layer,"),
    "permutation_score": _largest("permutation_score", "The rise of the loss if a layer and the next are swapped"),
    "jacobian": _largest("jacobian", "The distance of the Jacobian from the identity"),
    "attention_sinks": _attention,
    "massive_activations": _massive,
    "logit_lens": _lens,
}
