"""Results of a diagnosis that comparisons and pages read, and their types."""

from __future__ import annotations

from typing import Any

from hf_cod.io.report import DropResults, Interval, RunReport
from hf_cod.io.schema import check_value

# Entry of a report's results -> its type.
_READ: dict[str, Any] = {
    "angular_distance": list[list[float | None]],
    "effective_depth": Interval,
    "late_share": float,
    "layer_drop": DropResults,
    "layer_parameters": list[int],
}


def check_results(report: RunReport) -> None:
    """Checks the results that `diagnose` writes, as far as a report has them.

    Raises:
        ValueError: an entry of another type, distances that are not square, or another number of layers.
    """
    for name, kind in _READ.items():
        check_value(report.results.get(name), kind | None, f"results[{name!r}] of {report.model}", {"nan": True})
    rows = report.results.get("angular_distance") or []
    odd = next((len(row) for row in rows if len(row) != len(rows)), None)
    if odd is not None:
        raise ValueError(
            f"results['angular_distance'] of {report.model}: expected {len(rows)} columns, as rows, got {odd}"
        )
    drop = report.results.get("layer_drop")
    if drop and len(drop["without"]) != report.n_layers:
        raise ValueError(
            f"results['layer_drop'] of {report.model}: expected {report.n_layers} values, got {len(drop['without'])}"
        )
