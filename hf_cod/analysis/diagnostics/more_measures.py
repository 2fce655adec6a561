"""The measures of `diagnose` that are computed on request, and how they predict the cost of a layer's removal."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from hf_cod.analysis.diagnostics.attention_sinks import THRESHOLD, measure_attention_sinks
from hf_cod.analysis.diagnostics.causal_score import measure_causal_score
from hf_cod.analysis.diagnostics.jacobians import N_PROBES, measure_jacobian
from hf_cod.analysis.diagnostics.logit_lens import measure_logit_lens
from hf_cod.analysis.diagnostics.massive_activations import measure_massive_activations
from hf_cod.analysis.diagnostics.permutation_score import measure_permutation_score
from hf_cod.analysis.diagnostics.settings import EVERYTHING, MORE_METRICS
from hf_cod.analysis.diagnostics.usefulness import measure_usefulness
from hf_cod.analysis.evaluation.metrics import Metric
from hf_cod.functional.depth import spearman, usefulness
from hf_cod.io.display import one_line
from hf_cod.io.journal import Journal
from hf_cod.io.report import RunReport
from hf_cod.io.text import Batch, describe_batches, split_samples
from hf_cod.layers.fingerprints import Journals

# A layer is useful if its replacement by a linear map raises the loss by more than this share (arXiv 2603.15389).
USEFUL = 0.1
# Values by layer whose order is compared with that of the cost of removal.
PREDICTORS = (
    "angular_distance",
    "block_influence",
    "added_share",
    "gradient_norm",
    "usefulness",
    "causal_score",
    "permutation_score",
    "jacobian",
    "attention_sinks",
    "massive_ratio",
    "lens_gain",
)


@dataclass(frozen=True)
class Found:
    """What a measure adds to a report.

    Attributes:
        layers: name -> one value per layer, None where it does not apply.
        results: the measure's entry in the results; empty: none.
    """

    layers: dict[str, list[Any]]
    results: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """What the measures are computed on.

    Attributes:
        model: the model.
        batches: dicts for its forward.
        metric: that of the layer drop.
        journals: the run's journals.
        seed: of random vectors.
        place: the stack's name for journals, if it was given.
        options: layers_path and show_progress.
    """

    model: nn.Module
    batches: Sequence[Batch]
    metric: Metric
    journals: Journals
    seed: int
    place: Sequence[str]
    options: dict[str, Any]

    def journal(self, measure: str, *settings: Any) -> Journal:
        """The journal of a measure."""
        return self.journals.of(measure, *settings, *self.place)

    def journal_of_losses(self, measure: str) -> Journal:
        """The journal of a measure by the metric; in memory for a metric that cannot be compared."""
        return self.journal(measure, self.metric.identity) if self.metric.identity else Journal(None, "")


def measure_more(request: Request, wanted: Sequence[str], report: RunReport, lenient: bool) -> None:
    """Adds those of `MORE_METRICS` that are wanted to a report.

    Args:
        request: model and batches.
        wanted: names of measures.
        report: the report.
        lenient: leave a measure that fails out, with the reason as a note.
    """
    for name in (name for name in MORE_METRICS if name in wanted):
        try:
            found = MEASURES[name](request)
        except Exception as error:
            if not lenient:
                raise
            report.notes.append(f"{name} was left out: {one_line(str(error)).removeprefix(f'{name}: ')}")
            continue
        report.layers.update(found.layers)
        if found.results:
            report.results[name] = found.results
    if set(wanted) & set(MORE_METRICS) and "layer_drop" in report.layers:
        report.results["rank_correlations"] = rank_correlations(report)


def more_cost(layers: int, wanted: Sequence[str]) -> str:
    """A sentence on what these measures cost, before they start; empty if none of them is wanted.

    Args:
        layers: L, number of layers.
        wanted: names of measures, or "all".
    """
    names = [name for name in MORE_METRICS if name in wanted or EVERYTHING in wanted]
    # Passes through the layers, as multiples of one forward pass of all samples; and how often the head reads.
    passes = {
        "usefulness": (1 + (layers - 1) / 4, (layers + 1) / 2),  # half of the samples for each part
        "causal_score": (1 + (layers - 1) / 2, 0),
        "permutation_score": (1 + (layers + 1) / 2, layers),
        "jacobian": (1 + N_PROBES, 0),
        "attention_sinks": (1, 0),
        "massive_activations": (1, 0),
        "logit_lens": (1, layers + 1),
    }
    costs = [sum(passes[name][part] for name in names) for part in range(2)]
    told = ", ".join(name.replace("_", " ") for name in names)
    return (
        f"{told}: about as long as {costs[0]:.0f} passes of the samples through the layers and {costs[1]:.0f} through "
        "the head"
        if names
        else ""
    )


def rank_correlations(report: RunReport) -> dict[str, float]:
    """Spearman's correlation, over layers, of each measure in `PREDICTORS` with the harm of a layer's removal.

    Layers without a value of either are left out.
    """
    sign = 1 if report.results["layer_drop"]["lower_is_better"] else -1
    drop = report.layers["layer_drop"]
    found = {}
    for name in (name for name in PREDICTORS if name in report.layers):
        both = [pair for pair in zip(drop, report.layers[name], strict=True) if None not in pair]
        pairs = [(sign * cost, value) for cost, value in both if not math.isnan(cost) and not math.isnan(value)]
        if len(pairs) > 1:
            a, b = torch.tensor(pairs, dtype=torch.float64).unbind(-1)
            found[name] = spearman(a, b)
    return found


def _usefulness(request: Request) -> Found:
    count = describe_batches(request.batches)["samples"]
    if count < 2:
        raise ValueError(f"usefulness: expected at least two samples, to fit maps and to measure, got {count}")
    fitting, measured = split_samples(request.batches, count // 2)
    journal = request.journal_of_losses("usefulness")
    intact, replaced = measure_usefulness(request.model, fitting, measured, request.metric, journal, **request.options)
    share = usefulness(intact, torch.tensor(replaced), USEFUL) if intact > 0 and not request.metric.compares else None
    results = {**_told(request), "intact": intact, "replaced": replaced, "threshold": USEFUL, "useful_share": share}
    return Found({"usefulness": [loss - intact for loss in replaced]}, results)


def _causal_score(request: Request) -> Found:
    values = measure_causal_score(request.model, request.batches, request.journal("causal_score"), **request.options)
    return Found({"causal_score": values})


def _permutation_score(request: Request) -> Found:
    journal = request.journal_of_losses("permutation_score")
    intact, swapped = measure_permutation_score(
        request.model, request.batches, request.metric, journal, **request.options
    )
    values = [None if loss is None else loss - intact for loss in swapped]
    return Found({"permutation_score": values}, {**_told(request), "intact": intact, "swapped": swapped})


def _jacobian(request: Request) -> Found:
    journal = request.journal("jacobian", request.seed, N_PROBES)
    values = measure_jacobian(request.model, request.batches, journal, seed=request.seed, **request.options)
    return Found({"jacobian": values}, {"n_probes": N_PROBES})


def _attention_sinks(request: Request) -> Found:
    journal = request.journal("attention_sinks")
    shares, heads = measure_attention_sinks(request.model, request.batches, journal, **request.options)
    return Found({"attention_sinks": shares, "sink_heads": heads}, {"threshold": THRESHOLD})


def _massive_activations(request: Request) -> Found:
    journal = request.journal("massive_activations")
    ratios, counts = measure_massive_activations(request.model, request.batches, journal, **request.options)
    return Found({"massive_ratio": ratios, "massive_activations": counts})


def _logit_lens(request: Request) -> Found:
    journal = request.journal_of_losses("logit_lens")
    intact, losses = measure_logit_lens(request.model, request.batches, request.metric, journal, **request.options)
    gains = [None, *(before - after for before, after in pairwise(losses))]
    return Found({"logit_lens": losses, "lens_gain": gains}, {**_told(request), "intact": intact})


def _told(request: Request) -> dict[str, Any]:
    """What losses are, for results; perplexity is its logarithm there."""
    return {"metric": "loss" if request.metric.name == "perplexity" else request.metric.name}


# Measure -> function that computes it.
MEASURES: dict[str, Callable[[Request], Found]] = {
    "usefulness": _usefulness,
    "causal_score": _causal_score,
    "permutation_score": _permutation_score,
    "jacobian": _jacobian,
    "attention_sinks": _attention_sinks,
    "massive_activations": _massive_activations,
    "logit_lens": _logit_lens,
}
