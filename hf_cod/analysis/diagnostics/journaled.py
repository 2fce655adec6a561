"""Checks of the results of `diagnose` in a journal, which may be another one's file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

from hf_cod.io.schema import check_value, limits

# Measure -> name of its values for layers -> their limits.
_LAYERS = {
    "angular_distance": {"angular_distance": limits(least=0, most=1)},
    "block_influence": {"block_influence": limits(least=-1e-3, most=2 + 1e-3)},  # up to rounding
    "output_variance": {
        "variance": limits(least=0),
        "mean": {},
        "max_abs": limits(least=0),
        "added_share": limits(least=0),
    },
}
_RESULTS = ("angular_distance", "idle_below", "effective_depth", "late_share", "intervals", "not_run", "runs")


class ForwardResults(TypedDict):
    """Results of the forward pass, as stored in a journal."""

    layers: dict[str, list[float | None]]
    results: dict[str, Any]


class _Depth(TypedDict):
    value: float
    low: float | None
    high: float | None
    confidence: float


def check_forward(value: Any, metrics: Sequence[str], layers: int) -> None:
    """Checks that a value can be the results of the forward pass of a model.

    Raises:
        ValueError: other measures, another number of layers, or values out of range. NaN may be a result.
    """
    found: ForwardResults = check_value(value, ForwardResults, "forward", {"nan": True})
    expected = {name: limited for metric in metrics for name, limited in _LAYERS[metric].items()}
    if found["layers"].keys() != expected.keys():
        raise ValueError(f"layers: expected {', '.join(expected)}, got {', '.join(found['layers'])}")
    for name, limited in expected.items():
        _check_row(found["layers"][name], name, limited, layers)
    results = found["results"]
    unknown = [name for name in results if name not in _RESULTS]
    if unknown:
        raise ValueError(f"results: expected {', '.join(_RESULTS)}, got {unknown[0]}")
    check_value(results.get("not_run", []), list[int], "not_run", limits(least=0, most=layers - 1))
    if "runs" in results:
        _check_length(check_value(results["runs"], list[int], "runs", limits(least=0)), "runs", layers)
    if "angular_distance" in metrics:
        rows = check_value(results.get("angular_distance"), list[Any], "angular_distance")
        _check_length(rows, "angular_distance", layers)
        for row in rows:
            _check_row(row, "angular_distance", limits(least=0, most=1), layers)
        check_value(results.get("idle_below"), float, "idle_below", limits(least=0, most=1))
    if "effective_depth" in results:
        depth = check_value(results["effective_depth"], _Depth, "effective_depth")
        check_value(depth["value"], float, "effective_depth", limits(least=0, most=layers + 1e-3))
        check_value(results.get("late_share"), float, "late_share", limits(least=0, most=1))
    kind = dict[str, list[tuple[float | None, float | None] | None]]
    intervals = check_value(results.get("intervals", {}), kind, "intervals", {"nan": True})
    for name, pairs in intervals.items():
        _check_length(pairs, f"intervals of {name}", layers)


def check_norms(value: Any, layers: int) -> None:
    """Checks that a value can be the norms of gradients of a model's layers.

    Raises:
        ValueError: another number of layers, or values that are no norms.
    """
    check_value(value, list[float | None], "gradient_norm", limits(least=0))
    _check_length(value, "gradient_norm", layers)


def _check_row(row: Any, name: str, limited: dict[str, Any], layers: int) -> None:
    check_value(row, list[float | None], name, {"nan": True, **limited})
    _check_length(row, name, layers)


def _check_length(row: Sequence[Any], name: str, layers: int) -> None:
    if len(row) != layers:
        raise ValueError(f"{name}: expected {layers} layers, got {len(row)}")
