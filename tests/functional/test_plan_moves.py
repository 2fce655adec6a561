"""Random changes of plans: they keep the budget, and reach every plan."""

import itertools

import pytest
import torch

from hf_cod.functional.plan_moves import balanced, climbed, exchange_zeros, filled, switch_rungs, switch_widths


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("n", [(10, 10, 10), (3, 50, 7), (1, 1)])
def test_exchanged_zeros_keep_their_sum_and_fit(n):
    x = [size // 2 for size in n]
    for seed in range(200):
        found = exchange_zeros(x, n, 0.25, seeded(seed))
        assert sum(found) == sum(x) and all(0 <= zeros <= size for zeros, size in zip(found, n, strict=True))
        moved = [abs(a - b) for a, b in zip(found, x, strict=True)]
        assert max(moved) <= round(0.25 * sorted(n)[1]) or len(n) == 2
        x = found


def test_zeros_move_by_a_share_of_the_smaller_part():
    for seed in range(20):
        changed = {b - a for a, b in zip([50, 5], exchange_zeros([50, 5], [100, 10], 0.3, seeded(seed)), strict=True)}
        assert changed == {3, -3}


@pytest.mark.parametrize("x", [[0, 0], [4, 4], [4]])
def test_zeros_without_a_giver_or_room_stay(x):
    assert exchange_zeros(x, [4] * len(x), 0.5, seeded(0)) == x


def test_switches_reach_every_full_plan_and_no_other():
    """Plans that keep the budget and to which no part could be added, by enumeration."""
    c, B = [5, 3, 3, 1, 8], 11
    full = set()
    for x in itertools.product((0, 1), repeat=len(c)):
        rest = B - sum(cost for width, cost in zip(x, c, strict=True) if width)
        if rest >= 0 and all(width or cost > rest for width, cost in zip(x, c, strict=True)):
            full.add(x)
    x, seen = tuple(filled([0] * len(c), c, B, range(len(c)))), set()
    for seed in range(600):
        x = tuple(switch_widths(x, c, B, seeded(seed)))
        seen.add(x)
    assert seen == full


@pytest.mark.parametrize("x, B", [([0, 0, 0], 0), ([1, 1, 1], 9)])
def test_widths_that_are_all_alike_stay(x, B):
    assert switch_widths(x, [3, 3, 3], B, seeded(0)) == x


def test_filled_takes_what_still_fits_in_the_given_order():
    assert filled([0, 1, 0, 0], [4, 2, 3, 1], 6, [2, 0, 3]) == [0, 1, 1, 1]
    assert filled([0, 1, 0, 0], [4, 2, 3, 1], 6, [0, 2, 3]) == [1, 1, 0, 0]


def test_balanced_reaches_the_sum():
    assert balanced([1, 2, 3], [4, 4, 4], 6) == [1, 2, 3]
    assert balanced([1, 2, 3], [4, 4, 4], 11) == [4, 4, 3]
    assert balanced([1, 2, 3], [4, 4, 4], 1) == [0, 0, 1]


def test_rungs_reach_every_full_plan_and_no_other():
    """Ladders of other lengths; plans that keep the budget and of which no part could be raised, by enumeration."""
    c, B = [(2, 5, 6), (1, 4), (3, 4, 9)], 12

    def cost(plan):
        return sum(costs[rung] for costs, rung in zip(c, plan, strict=True))

    plans = [plan for plan in itertools.product(*(range(len(costs)) for costs in c)) if cost(plan) <= B]
    raised = {p: [(*p[:i], p[i] + 1, *p[i + 1 :]) for i in range(3)] for p in plans}
    full = {plan for plan in plans if not any(other in plans for other in raised[plan])}
    seen, todo = set(), [tuple(climbed((0, 0, 0), c, B, range(3)))]
    while todo:
        plan = todo.pop()
        if plan not in seen:
            seen.add(plan)
            todo += [tuple(switch_rungs(plan, c, B, seeded(seed))) for seed in range(60)]
    assert len(full) > 3 and seen == full


def test_rungs_without_a_way_stay():
    assert switch_rungs([1, 1], [(1, 2), (1, 2)], 9, seeded(0)) == [1, 1]  # all are at the top
    assert switch_rungs([0, 0], [(1, 9), (1, 9)], 5, seeded(0)) == [0, 0]  # none can pay
    assert climbed([0, 0], [(1, 2, 4), (1, 3)], 5, [0, 1]) == [2, 0]
