"""What a report says of the removal of each single layer: changes of a metric, and their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

from hf_cod.analysis.diagnostics.forward_results import keep_intervals
from hf_cod.analysis.diagnostics.intervals import drop_ends
from hf_cod.analysis.diagnostics.layer_drop import keys_of, measure_layer_drop
from hf_cod.analysis.evaluation.metrics import Metric
from hf_cod.io.journal import Journal
from hf_cod.io.report import RunReport
from hf_cod.io.text import Batch
from hf_cod.layers.removal.refusals import why_not_skipped
from hf_cod.layers.stack import DecoderLayers


def report_layer_drop(
    report: RunReport,
    stack: DecoderLayers,
    batches: Sequence[Batch],
    metric: Metric,
    journal: Journal,
    seed: int,
    options: dict[str, Any],
) -> None:
    """Adds the performance drop of each layer to a report, with intervals, and a note on layers that have none."""
    why_not = cache(partial(why_not_skipped, stack))
    intact, without = measure_layer_drop(stack.model, batches, metric, journal, why_not=why_not, **options)
    known = [layer for layer, value in enumerate(without) if value is not None]
    report.layers["layer_drop"] = [None if value is None else value - intact for value in without]
    for layer in (i for i in range(len(stack)) if i not in known):
        report.notes.append(
            f"layer_drop of layer {layer} was left out, because skip does not remove it: {why_not(layer)!r}"
        )
    report.results["layer_drop"] = {
        "metric": metric.name,
        "lower_is_better": metric.lower_is_better,
        "intact": intact,
        "without": without,
    }
    ends = drop_ends(journal, [keys_of(layer, len(batches)) for layer in known], metric, seed) if known else None
    if ends is not None:
        found = dict(zip(known, ends, strict=True))
        keep_intervals(report.results, layer_drop=[found.get(i, [None, None]) for i in range(len(stack))])
