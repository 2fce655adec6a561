"""The cheapest combination against trying all of them."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_cod.functional.combination import best_combinations, filled, rising


def naive(saved, costs, most, exclusive):
    """Set of knobs -> (cost, left) of its cheapest combination."""
    found = {}
    for steps in itertools.product(*(range(len(saved[knob])) for knob in saved)):
        used = frozenset(knob for knob, step in zip(saved, steps, strict=True) if step)
        if any({a, b} <= used for a, b in exclusive):
            continue
        left = math.prod(1 - saved[knob][step] for knob, step in zip(saved, steps, strict=True))
        cost = sum(costs[knob][step] for knob, step in zip(saved, steps, strict=True))
        if left <= most * (1 + 1e-9) and (used not in found or cost < found[used][0]):
            found[used] = (cost, left)
    return found


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.floats(0.05, 1.0))
def test_all_combinations_are_compared(seed, knobs, most):
    generator = torch.Generator().manual_seed(seed)
    names = "abcd"[:knobs]
    draw = lambda: [0.0, *torch.rand(3, generator=generator, dtype=torch.float64).mul(0.9).sort().values.tolist()]  # noqa: E731
    saved, costs = {name: draw() for name in names}, {name: draw() for name in names}
    exclusive = [("a", "b")]
    found = best_combinations(saved, costs, most, exclusive, 1 << knobs)
    expected = naive(saved, costs, most, exclusive)
    assert {frozenset(c.steps): pytest.approx((c.cost, c.left)) for c in found} == expected
    assert [c.cost for c in found] == sorted(c.cost for c in found)
    assert best_combinations(saved, costs, most, exclusive, 1) == found[:1]


def test_values_between_measured_steps():
    assert filled({0: 0.0, 1: 4.0, 4: 1.0}, 5) == [0.0, 4.0, 3.0, 2.0, 1.0]
    assert rising({0: 0.0, 1: 0.5, 2: 0.3, 3: -0.1, 4: 0.9}) == {0: 0.0, 1: 0.0, 2: 0.0, 3: 0.0, 4: 0.9}


def test_out_of_reach():
    assert best_combinations({"a": [0.0, 0.5]}, {"a": [0.0, 1.0]}, 0.4) == []
