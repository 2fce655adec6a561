"""Findings in sentences: what every compressing command prints at the end, from the keys that its report holds."""

from __future__ import annotations

from typing import Any

from hf_cod.io.report import format_number


def closing(results: dict[str, Any], made: str) -> list[str]:
    """Size, perplexity and speed of what was saved, beside the intact model.

    Args:
        results: of a report of `compression.run`.
        made: the key of what was made.
    """
    return [_size(results, made), *_perplexity(results, made), *describe_speed(results, made)]


def does_harm(alike: float | None, by_score: float | None) -> bool:
    """Whether all layers alike have a lower perplexity than a plan by a score; what is written alike is no harm."""
    if alike is None or by_score is None:
        return False
    return alike < by_score and format_number(alike) != format_number(by_score)


def harm_notes(fallback: dict[str, Any]) -> list[str]:
    """What became of a score that did harm: results["fallback"] of a report of `compression.run`, or nothing."""
    if not fallback:
        return []
    by_score, alike = (format_number(fallback[name]) for name in ("perplexity", "alike"))
    return [
        f"score {fallback['score']} did harm: perplexity {by_score} against {alike} with all layers alike; all layers "
        "were treated alike. --force keeps the score. This was decided on the samples that are reported on, so the "
        "perplexity is the smaller of two."
    ]


def _size(results: dict[str, Any], made: str) -> str:
    memory, counted = results["memory_bytes"], ""
    if "parameters" in results:
        before, left = results["parameters"]["intact"], results["parameters"][made]
        counted = f"has {left:,} parameters, {format_number(left / before)} of the {before:,} before, and "
    return (
        f"The whole model {counted}takes {_megabytes(memory[made])} MB in memory, {_megabytes(memory['intact'])} "
        f"before; {_megabytes(results['disk_bytes'])} MB on disk."
    )


def _megabytes(size: int) -> str:
    """Of 10^6 bytes, small ones to three digits."""
    return f"{size / 1e6:,.1f}" if size >= 1e6 else format_number(size / 1e6)


def _perplexity(results: dict[str, Any], made: str) -> list[str]:
    """Beside what was made, all layers alike ("uniform") and "recovered", where those were measured."""
    figures = results["perplexity"]
    found = {name: format_number(value) for name, value in figures.items() if value is not None}
    if not found:
        return []
    compared = f" (all layers alike: {found['uniform']})" if "uniform" in found else ""
    if "fallback" in results:
        compared = ""  # it is what was made
    if "recovered" in found:
        compared += f" and by recovery to {found['recovered']}"
    sentences = [
        f"Perplexity goes from {found['intact']} to {found[made]}{compared}, measured on "
        f"{results['evaluation']['samples']} samples that were not seen before."
    ]
    if "fallback" not in results and does_harm(figures.get("uniform"), figures[made]):
        sentences.append("So on these samples this score does harm: --score uniform treats all layers alike.")
    return sentences


def describe_speed(results: dict[str, Any], after: str, before: str = "intact") -> list[str]:
    """A sentence on what became of speed: results["speed"] holds `before` and `after`, or nothing."""
    if not results["speed"]:
        return []
    old, new = results["speed"][before], results["speed"][after]
    told = {"prompt": f"of a prompt of {new['prompt_tokens']}", "generation": "generated one by one"}
    figures = [
        f"{format_number(new[part])} {what} ({before} {format_number(old[part])}: {new[part] / old[part]:.2f} times)"
        for part, what in told.items()
        if old[part] is not None and new[part] is not None
    ]
    apart = "" if before == "teacher" else "; timed apart, so that a busy machine shows, too"
    return [f"Tokens a second: {', '.join(figures)}{apart}."]
