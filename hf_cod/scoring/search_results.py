"""What a search says about the plan that it found: `LayerAllocation.search`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hf_cod.io.report import RunReport, format_number
from hf_cod.io.schema import check_value, limits

# Entries in nats per token.
_DIVERGENCES = ("uniform_divergence", "start_divergence", "divergence")


def check_search(search: Mapping[str, Any]) -> None:
    """Checks the entries of a file that are read.

    Raises:
        ValueError: one is missing, or of another type. Without any entry there was no search.
    """
    if not search:
        return
    for name in _DIVERGENCES:
        check_value(search.get(name), float, f"search[{name!r}]")
    check_value(search.get("start"), str, "search['start']")
    check_value(search.get("passes"), int, "search['passes']", limits(least=0))


def search_sentences(search: Mapping[str, Any]) -> list[str]:
    """What a report says about the search; nothing if there was none."""
    if not search:
        return []
    said = {name: format_number(search[name]) for name in _DIVERGENCES}
    return [
        f"The search found a plan with a divergence of {said['divergence']} nats per token, by {search['passes']} "
        f"forward passes of one sample; the plan that it started from ({search['start']}) has "
        f"{said['start_divergence']}, the uniform plan {said['uniform_divergence']}."
    ]


def with_search(report: RunReport, search: Mapping[str, Any]) -> RunReport:
    """The report of a method that applied a plan, with what the search says about the plan; without one unchanged."""
    if not search:
        return report
    summary = [*report.summary, *search_sentences(search)]
    return replace(report, results={**report.results, "search": {**search}}, summary=summary)
