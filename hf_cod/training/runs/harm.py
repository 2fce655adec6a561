"""A note on a training that makes the model worse."""

from __future__ import annotations

import math

from hf_cod.io.report import format_number


def harm_of_training(before: float, after: float, rate: float) -> list[str]:
    """A note for the report if the perplexity is higher after a training than before; empty if it is not.

    Values that print equal count as equal.

    Args:
        before: perplexity on held-out samples before the training.
        after: perplexity on the same samples after it; NaN counts as higher.
        rate: the learning rate of the training.
    """
    old, new = format_number(before), "NaN" if math.isnan(after) else format_number(after)
    if math.isnan(before) or after <= before or old == new:
        return []
    return [
        f"the training raised the perplexity from {old} to {new}: use a lower learning rate than {rate:g} "
        "(--learning-rate) or fewer steps"
    ]
