"""Closing sentences of all compressing commands, generated from the results in their reports."""

from __future__ import annotations

from typing import Any

from hf_cod.io.report import format_number

# Baseline that replaces a plan with a higher perplexity -> what it is.
RIVALS = {"uniform": "a uniform plan", "three": "3 bits for all layers"}
# For models that transformers alone cannot load, the last sentence.
TO_LOAD = "To load it, import hf_cod before from_pretrained."


def closing(results: dict[str, Any], made: str) -> list[str]:
    """Sentences on size, perplexity and speed of the saved model, compared with the intact model.

    Args:
        results: results of a report; perplexity and speed may be missing, as they are in those of pack.
        made: the key of the saved model in them, such as "pruned".
    """
    return [_size(results, made), *_perplexity(results, made), *describe_speed(results, made)]


def does_harm(alike: float | None, by_score: float | None) -> bool:
    """Whether a uniform plan has a lower perplexity than a plan by score; values that print equal count as equal."""
    if alike is None or by_score is None:
        return False
    return alike < by_score and format_number(alike) != format_number(by_score)


def harm_notes(fallback: dict[str, Any], rival: str) -> list[str]:
    """A note on the baseline that replaced a plan by score, if one did.

    Args:
        fallback: results["fallback"] of a report of `compression.run`; empty if the plan was kept.
        rival: name of the baseline, of `RIVALS`.
    """
    if not fallback:
        return []
    by_score, alike = (format_number(fallback[name]) for name in ("perplexity", "uniform"))
    scored, kept = f"score {fallback['score']}", "score"
    if "experts" in fallback:
        scored, kept = f"{scored} of layers with score {fallback['experts']} of experts", "scores"
    return [
        f"{scored} had a higher perplexity ({by_score}) than {RIVALS[rival]} ({alike}), which was applied instead; "
        f"--force keeps the {kept}. Both perplexities are of the reported evaluation samples, so the reported one is "
        "the lower of the two."
    ]


def _size(results: dict[str, Any], made: str) -> str:
    memory, counted = results["memory_bytes"], ""
    if "parameters" in results:
        before, left = results["parameters"]["intact"], results["parameters"][made]
        counted = f"has {left:,} parameters, {format_number(left / before)} of the {before:,} before, and "
    return (
        f"The full model {counted}takes {_megabytes(memory[made])} MB in memory ({_megabytes(memory['intact'])} MB "
        f"before) and {_megabytes(results['disk_bytes'])} MB on disk."
    )


def _megabytes(size: int) -> str:
    """A size in MB (10^6 bytes); below 1 MB with four significant digits."""
    return f"{size / 1e6:,.1f}" if size >= 1e6 else format_number(size / 1e6)


def _perplexity(results: dict[str, Any], made: str) -> list[str]:
    """Perplexity before and after, and of the "uniform" plan and the "recovered" model if they were measured."""
    figures = results.get("perplexity", {})
    found = {name: format_number(value) for name, value in figures.items() if value is not None}
    if not found:
        return []
    compared = f" (uniform plan: {found['uniform']})" if "uniform" in found else ""
    if "fallback" in results:
        compared = ""  # the uniform plan is the one that was applied
    if "recovered" in found:
        compared += f", and to {found['recovered']} by recovery"
    sentences = [
        f"Perplexity goes from {found['intact']} to {found[made]}{compared}, on "
        f"{results['evaluation']['samples']} held-out samples."
    ]
    if "fallback" not in results and does_harm(figures.get("uniform"), figures[made]):
        sentences.append("On these samples the score is worse than a uniform plan, which --score uniform applies.")
    return sentences


def describe_speed(results: dict[str, Any], after: str, before: str = "intact") -> list[str]:
    """A sentence on speed before and after, if results["speed"] holds `before` and `after`."""
    if not results.get("speed"):
        return []
    old, new = results["speed"][before], results["speed"][after]
    told = {"prompt": f"for a prompt of {new['prompt_tokens']}", "generation": "in generation"}
    figures = [
        f"{format_number(new[part])} {what} ({before} {format_number(old[part])}: {new[part] / old[part]:.2f} times)"
        for part, what in told.items()
        if old[part] is not None and new[part] is not None
    ]
    apart = "" if before == "teacher" else "; not timed side by side, so other load on the machine affects the ratio"
    error = new.get("generation_error")
    failed = "" if error is None else f"; generation is not timed, since it fails ({error})"
    return [f"Tokens per second: {', '.join(figures)}{apart}{failed}."]
