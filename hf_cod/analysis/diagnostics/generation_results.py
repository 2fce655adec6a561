"""What a report says of a `GenerationDrop`: changes by layer, their intervals, and rank correlations of readings."""

from __future__ import annotations

from functools import partial
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from hf_cod.analysis.diagnostics.generation_drop import GenerationDrop, verdict
from hf_cod.analysis.diagnostics.intervals import CONFIDENCE, LEAST_SAMPLES, Ends, ends_of
from hf_cod.analysis.generation.settings import READINGS
from hf_cod.functional.depth import bootstrap_interval, spearman

# Reading -> 1 if a larger value is worse.
SIGN = {"reference_loss": 1, "chain_loss": 1, "task_accuracy": -1}
# Decimals to which changes are compared: equal scores whose means differ by rounding are ties.
TIES = 9


def sums_of(found: GenerationDrop) -> dict[str, Tensor]:
    """Reading -> (S, L, 3): sum without the layer, sum of the intact model and number of tokens or answers, of each
    prompt; all 0 where no answer was generated. A mean is a quotient of their sums.
    """
    known = ~found.scores[:, 1:].isnan()
    scores = torch.stack([found.scores[:, 1:].where(known, 0), found.scores[:, :1] * known, known.double()], -1)
    readings = {"task_accuracy": scores}
    for name, losses, tokens in (
        ("reference_loss", found.reference, found.reference_tokens),
        ("chain_loss", found.chain, found.chain_tokens),
    ):
        without = losses[:, 1:]
        readings[name] = torch.stack(
            [without, losses[:, :1].expand_as(without), tokens[:, None].expand_as(without)], -1
        )
    return {name: readings[name] for name in READINGS}


def changes(sums: Tensor, unknown: Tensor | None = None) -> Tensor:
    """(..., L): the mean without the layer minus that of the intact model on the same prompts.

    Args:
        sums: (..., L, 3), see `sums_of`.
        unknown: (L,) value for a resample without any prompt that the model without this layer answered.
    """
    found = (sums[..., 0] - sums[..., 1]) / sums[..., 2]
    return found if unknown is None else found.where(sums[..., 2] > 0, unknown)


def generation_figures(
    found: GenerationDrop, seed: int
) -> tuple[dict[str, list[float]], dict[str, Any], dict[str, Ends]]:
    """Entries of a report.

    Returns:
        Reading -> change by layer; the entry `generation` of the results; and reading -> [low, high] of each change,
        from the percentile bootstrap over prompts, the same resamples for all models.
    """
    sums = sums_of(found)
    layers = {name: changes(each.mean(0)).tolist() for name, each in sums.items()}
    ends = {}
    for name, each in sums.items():
        pairs = ends_of(each, seed, partial(changes, unknown=changes(each.mean(0))))
        if pairs is not None:
            ends[name] = pairs
    results = {
        "prompts": len(found.scores),
        "left_out": found.left_out,
        "intact": {name: _intact(each) for name, each in _columns(found).items()},
        "without": {name: _without(each) for name, each in sums.items()},
        "prompts_by_layer": (~found.scores[:, 1:].isnan()).sum(0).tolist(),
        "verdicts": verdicts(found),
        "tasks": {name: _of_task(found, place) for place, name in enumerate(found.tasks)},
        "rank_correlations": rank_correlations(sums, seed),
        "answers": found.answers[:LEAST_SAMPLES],
    }
    return layers, results, ends


def verdicts(found: GenerationDrop) -> list[str]:
    """ "harmful", "helpful" or "open" for each layer, see `verdict`."""
    return [verdict(found.scores[:, i], found.scores[:, 0], found.looks) for i in range(1, found.scores.shape[1])]


def rank_correlations(sums: dict[str, Tensor], seed: int) -> list[dict[str, Any]]:
    """Spearman's correlation, over layers, of the harm of removal by two readings: value, low and high.

    Harm is the rise of a loss or the fall of the accuracy. Intervals are percentile bootstraps over prompts; None with
    fewer than `LEAST_SAMPLES`.
    """
    found = []
    for one, other in combinations(sums, 2):
        signs = sums[one].new_tensor([[SIGN[name], SIGN[name], 1] for name in (one, other)])
        both = torch.stack([sums[one], sums[other]], 1) * signs[:, None]  # (S, 2, L, 3)

        def correlation(means: Tensor, unknown: Tensor) -> Tensor:
            pairs = changes(means, unknown).round(decimals=TIES)  # (draws, 2, L)
            return means.new_tensor([spearman(a, b) for a, b in pairs])

        statistic = partial(correlation, unknown=changes(both.mean(0)))
        value = float(statistic(both.mean(0)[None])[0])
        low = high = None
        if len(both) >= LEAST_SAMPLES:
            low, high = map(float, bootstrap_interval(both, statistic, confidence=CONFIDENCE, seed=seed))
        found.append({"readings": [one, other], "value": value, "low": low, "high": high, "confidence": CONFIDENCE})
    return found


def generation_summary(results: dict[str, Any], layers: dict[str, list[float]]) -> list[str]:
    """The findings in sentences."""
    intact = results["intact"]["task_accuracy"]
    harmful = [i for i, told in enumerate(results["verdicts"]) if told == "harmful"]
    order = sorted(range(len(layers["task_accuracy"])), key=lambda i: layers["task_accuracy"][i])
    worst = order[0]
    sentences = [
        f"The intact model's answers to {results['prompts']} prompts score {intact:.1%}, those without layer {worst} "
        f"{results['without']['task_accuracy'][worst]:.1%}, the least. The removal of {len(harmful)} of {len(order)} "
        "single layers clearly lowers the score."
    ]
    for each in results["rank_correlations"]:
        one, other = (name.replace("_", " ") for name in each["readings"])
        interval = (
            "" if each["low"] is None else f" ({CONFIDENCE:.0%} interval {each['low']:.2f} to {each['high']:.2f})"
        )
        sentences.append(
            f"Rank correlation of the harm of removal by {one} and by {other}: {each['value']:.2f}{interval}."
        )
    return sentences


def _columns(found: GenerationDrop) -> dict[str, tuple[Tensor, Tensor]]:
    ones = torch.ones_like(found.scores[:, 0])
    return {
        "reference_loss": (found.reference[:, 0], found.reference_tokens),
        "chain_loss": (found.chain[:, 0], found.chain_tokens),
        "task_accuracy": (found.scores[:, 0], ones),
    }


def _intact(column: tuple[Tensor, Tensor]) -> float:
    return float(column[0].sum() / column[1].sum())


def _without(sums: Tensor) -> list[float]:
    total = sums.sum(0)
    return (total[:, 0] / total[:, 2]).tolist()


def _of_task(found: GenerationDrop, place: int) -> dict[str, Any]:
    """Number of prompts, and the readings of the intact model and without each layer, of one task."""
    mine = torch.tensor([each == place for each in found.places])
    intact = {name: _intact((a[mine], b[mine])) for name, (a, b) in _columns(found).items()}
    without = {name: _without(each[mine]) for name, each in sums_of(found).items()}
    return {"prompts": int(mine.sum()), "intact": intact, "without": without}
