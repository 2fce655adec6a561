"""Results of the forward pass of `diagnose`, as a journal and a report hold them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hf_cod.analysis.diagnostics.findings import layer_ranges
from hf_cod.analysis.diagnostics.forward_measures import ForwardMeasures
from hf_cod.analysis.diagnostics.intervals import CONFIDENCE, LEAST_SAMPLES, ends_of
from hf_cod.analysis.diagnostics.journaled import ForwardResults
from hf_cod.functional import depth


def forward_results(measures: ForwardMeasures, metrics: Sequence[str], seed: int) -> ForwardResults:
    """The requested measures, with their intervals.

    Args:
        measures: of the forward pass.
        metrics: some of `FORWARD_METRICS`.
        seed: seed of the intervals' resamples.
    """
    layers: dict[str, Any] = {}
    results: dict[str, Any] = {}
    if "angular_distance" in metrics:
        matrix = measures.angular_distance()
        results["angular_distance"] = [[None if v != v else v for v in row] for row in matrix.tolist()]
        layers["angular_distance"] = matrix[:, 0].tolist()
        turns = depth.adjacent(measures.distances)  # (S, L)
        results["idle_below"] = measures.idle_below()
        if max(layers["angular_distance"]) > results["idle_below"]:
            results.update(_depth_figures(turns, seed))
        keep_intervals(results, angular_distance=ends_of(turns, seed))
    if "block_influence" in metrics:
        layers["block_influence"] = measures.influence.double().mean(0).tolist()
        keep_intervals(results, block_influence=ends_of(measures.influence, seed))
    if "output_variance" in metrics:
        layers.update(measures.output_variance())
    if max(measures.runs) > 1:
        results["runs"] = list(measures.runs)
    if measures.not_run:
        results["not_run"] = list(measures.not_run)
        for name in ("angular_distance", "block_influence", "added_share"):
            if name in layers:
                layers[name] = [None if i in measures.not_run else v for i, v in enumerate(layers[name])]
    return {"layers": layers, "results": results}


def repeated_notes(runs: Sequence[int]) -> list[str]:
    """Notes on layers that run several times in a forward pass, by their number of runs."""
    notes = []
    for count in sorted({count for count in runs if count > 1}):
        layers = [index for index, found in enumerate(runs) if found == count]
        which = f"{'layer' if len(layers) == 1 else 'layers'} {layer_ranges(layers)}"
        notes.append(f"{which} ran {count} times in a forward pass; figures are means over these runs")
    return notes


def keep_intervals(results: dict[str, Any], **ends: Any) -> None:
    """Adds intervals of measures to the results of a report; None stands for no interval."""
    results.setdefault("intervals", {}).update({name: pairs for name, pairs in ends.items() if pairs is not None})


def _depth_figures(steps: Tensor, seed: int) -> dict[str, Any]:
    """Effective depth and late share from each sample's distances (S, L) between neighbouring layers."""
    low, high = None, None
    if len(steps) >= LEAST_SAMPLES:
        low, high = map(float, depth.bootstrap_interval(steps, depth.effective_depth, confidence=CONFIDENCE, seed=seed))
    mean = steps.mean(0)
    value = float(depth.effective_depth(mean))
    return {
        "effective_depth": {"value": value, "low": low, "high": high, "confidence": CONFIDENCE},
        "late_share": float(depth.late_share(mean)),
    }
