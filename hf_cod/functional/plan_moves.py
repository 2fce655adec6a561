"""Random changes of a plan that keep its budget.

Symbols: x (P,) the plan, for each part of the model its number of zeros, or whether it has the larger of two widths;
n (P,) weights of the parts; c (P,) what the larger width costs more; B the budget of these costs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch


def exchange_zeros(x: Sequence[int], n: Sequence[int], share: float, generator: torch.Generator) -> list[int]:
    """Moves zeros from a random part i to a random part j. Their sum over all parts is kept exactly.

        x_i <- x_i - t,   x_j <- x_j + t,   t = min( round(share min(n_i, n_j)), x_i, n_j - x_j )

    Args:
        x: (P,) number of zeros.
        n: (P,) number of weights; 0 <= x_i <= n_i.
        share: of the smaller part.
        generator: of the random choices.

    Returns:
        (P,); equal to x if no part has zeros, or no other part has room.
    """
    found = list(x)
    givers = [i for i, zeros in enumerate(x) if zeros]
    i = _one_of(givers, generator)
    j = _one_of([k for k, zeros in enumerate(x) if zeros < n[k] and k != i], generator)
    if i is not None and j is not None:
        t = min(round(share * min(n[i], n[j])), x[i], n[j] - x[j])
        found[i], found[j] = x[i] - t, x[j] + t
    return found


def switch_widths(x: Sequence[int], c: Sequence[int], B: int, generator: torch.Generator) -> list[int]:
    """Gives the larger width to a random part, and takes it from random other ones until the budget is met.

    EvoPress's level switch (arXiv 2410.14649, section 3) exchanges parts of one size. Here sizes may differ: what is
    left of the budget then goes to random parts that it suffices for.

    Args:
        x: (P,) 1 for the larger width, else 0; sum_i c_i x_i <= B.
        c: (P,) above 0.
        B: at least each c_i that is to be reached.
        generator: of the random choices.

    Returns:
        (P,) with sum_i c_i x_i <= B, where no part of width 0 would still fit; equal to x if all parts are alike.
    """
    found = list(x)
    raised = _one_of([i for i, width in enumerate(x) if not width and c[i] <= B], generator)
    if raised is None or not any(x):
        return found
    found[raised] = 1
    lowered: list[int] = []
    for i in _shuffled([i for i, width in enumerate(x) if width], generator):
        if _spent(found, c) <= B:
            break
        found[i] = 0
        lowered.append(i)
    rest = [i for i, width in enumerate(found) if not width and i not in lowered]
    return filled(found, c, B, [*_shuffled(rest, generator), *lowered])


def filled(x: Sequence[int], c: Sequence[int], B: int, order: Iterable[int]) -> list[int]:
    """Gives the larger width to the parts of `order` for which the rest of the budget suffices, one after another."""
    found, rest = list(x), B - _spent(x, c)
    for i in order:
        if not found[i] and c[i] <= rest:
            found[i] = 1
            rest -= c[i]
    return found


def switch_rungs(x: Sequence[int], c: Sequence[Sequence[int]], B: int, generator: torch.Generator) -> list[int]:
    """`switch_widths` for ladders of widths: raises a random part by a rung, and lowers random other ones until the
    budget is met; what is left of the budget then goes to random parts.

    Args:
        x: (P,) rung of each part; sum_i c_i[x_i] <= B.
        c: (P,) rising costs of the rungs of each part.
        B: of the sum of costs.
        generator: of the random choices.

    Returns:
        (P,) with sum_i c_i[x_i] <= B; equal to x if no part can be raised.
    """
    raised = _one_of([i for i, rung in enumerate(x) if rung + 1 < len(c[i])], generator)
    if raised is None:
        return list(x)
    found = list(x)
    found[raised] += 1
    lowered: list[int] = []
    while _cost(found, c) > B:
        i = _one_of([i for i, rung in enumerate(found) if rung and i != raised], generator)
        if i is None:
            return list(x)
        found[i] -= 1
        lowered.append(i)
    rest = [i for i in range(len(x)) if i != raised and i not in lowered]
    return climbed(found, c, B, [*_shuffled(rest, generator), raised, *dict.fromkeys(lowered)])


def climbed(x: Sequence[int], c: Sequence[Sequence[int]], B: int, order: Iterable[int]) -> list[int]:
    """Raises the parts of `order`, one after another, each by as many rungs as the rest of the budget allows."""
    found, rest = list(x), B - _cost(x, c)
    for i in order:
        while found[i] + 1 < len(c[i]) and c[i][found[i] + 1] - c[i][found[i]] <= rest:
            rest -= c[i][found[i] + 1] - c[i][found[i]]
            found[i] += 1
    return found


def balanced(x: Sequence[int], n: Sequence[int], total: int) -> list[int]:
    """Adds zeros to the first parts that have room, or takes them from the first ones that have some, up to a sum.

    Args:
        x: (P,) number of zeros.
        n: (P,) number of weights.
        total: 0..sum(n).
    """
    found, missing = list(x), total - sum(x)
    for i, size in enumerate(n):
        change = max(min(missing, size - found[i]), -found[i])
        found[i] += change
        missing -= change
    return found


def _cost(x: Sequence[int], c: Sequence[Sequence[int]]) -> int:
    return sum(costs[rung] for rung, costs in zip(x, c, strict=True))


def _spent(x: Sequence[int], c: Sequence[int]) -> int:
    return sum(cost for width, cost in zip(x, c, strict=True) if width)


def _one_of(places: Sequence[int], generator: torch.Generator) -> int | None:
    return places[int(torch.randint(len(places), (), generator=generator))] if places else None


def _shuffled(places: Sequence[int], generator: torch.Generator) -> list[int]:
    return [places[i] for i in torch.randperm(len(places), generator=generator).tolist()]
