"""The cheapest combination of steps within a budget, assuming that costs add up and savings multiply.

Symbols: a knob k removes the share s_k of what is left, 0 <= s_k < 1, at the cost c_k(s_k), c_k(0) = 0; a combination
leaves prod_k (1 - s_k) and has the expected cost sum_k c_k(s_k).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import torch


@dataclass(frozen=True)
class Combination:
    """One combination of steps.

    Attributes:
        steps: knob -> index of its step; knobs at their first step are left out.
        left: the product of the shares that the steps leave.
        cost: the sum of their costs.
    """

    steps: dict[str, int]
    left: float
    cost: float


def filled(known: Mapping[int, float], number: int) -> list[float]:
    """Values of steps 0 to `number` - 1: the known ones, with linear interpolation between them.

    Args:
        known: step -> value; the first and the last step are known.
        number: number of steps.
    """
    at = sorted(known)
    assert at[0] == 0 and at[-1] == number - 1
    found = [known[0]]
    for here, there in pairwise(at):
        slope = (known[there] - known[here]) / (there - here)
        found += [known[here] + slope * (step - here) for step in range(here + 1, there + 1)]
    return found


def rising(costs: Mapping[int, float]) -> dict[int, float]:
    """The largest rising costs that nowhere exceed the given ones.

    Where a later step was measured to cost less, earlier steps get its cost. Costs below 0, which are noise, become 0.
    """
    found, least = {}, math.inf
    for step in sorted(costs, reverse=True):
        least = min(least, max(costs[step], 0.0))
        found[step] = least
    return dict(sorted(found.items()))


def best_combinations(
    saved: Mapping[str, Sequence[float]],
    costs: Mapping[str, Sequence[float]],
    most: float,
    exclusive: Collection[tuple[str, str]] = (),
    number: int = 1,
) -> list[Combination]:
    """The cheapest combinations that leave at most `most`, one for each set of knobs.

    All combinations are compared: five knobs of 10 to 50 steps are a million, which takes a few tensor operations.

    Args:
        saved: knob -> s of each of its steps, the first one 0.
        costs: knob -> cost of each step, the first one 0.
        most: upper bound of the product of the shares that are left.
        exclusive: pairs of knobs of which one must be at its first step.
        number: number of combinations to return, cheapest first, each with a different set of knobs.

    Returns:
        At most `number`; none where no combination leaves at most `most`.
    """
    knobs = [*saved]
    shape = [len(saved[knob]) for knob in knobs]
    left, cost = torch.ones(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    for k, knob in enumerate(knobs):
        along = [1] * k + [-1] + [1] * (len(knobs) - k - 1)
        left = left * (1 - torch.tensor(saved[knob], dtype=torch.float64)).view(along)
        cost = cost + torch.tensor(costs[knob], dtype=torch.float64).view(along)
    cost = cost.masked_fill(left > most * (1 + 1e-9), math.inf)
    found = []
    for uses in product((False, True), repeat=len(knobs)):
        used = {knob for knob, is_used in zip(knobs, uses, strict=True) if is_used}
        if any(used.issuperset(pair) for pair in exclusive):
            continue
        part = tuple(slice(1, None) if is_used else slice(1) for is_used in uses)
        costs_here = cost[part]
        if not costs_here.numel():
            continue
        place = torch.unravel_index(costs_here.argmin(), costs_here.shape)
        if math.isfinite(costs_here[place]):
            steps = {knob: int(at) + 1 for knob, at in zip(knobs, place, strict=True) if knob in used}
            found.append(Combination(steps, float(left[part][place]), float(costs_here[place])))
    return sorted(found, key=lambda combination: combination.cost)[:number]
