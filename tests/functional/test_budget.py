import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from hf_cod.functional import budget

layers = st.integers(1, 40).flatmap(
    lambda n: st.tuples(
        st.lists(st.floats(-1e6, 1e6), min_size=n, max_size=n),
        st.lists(st.integers(1, 10**9), min_size=n, max_size=n),
    )
)


def tensors(drawn):
    return tuple(torch.tensor(values, dtype=torch.float64) for values in drawn)


def weighted_mean(x, w):
    return float((x * w).sum() / w.sum())


@given(layers, st.floats(0, 1), st.floats(0, 1), st.booleans())
@example(([0.0, 0.0, 1.0], [1, 1, 1]), 0.7, 0.27, True)  # two at one end of the interval
@example(([1e-320, 0.0], [1, 10**9]), 0.5, 1.0, True)
def test_spread_keeps_interval_mean_and_order(drawn, S, share, falling):
    D, w = tensors(drawn)
    lam = share * min(S, 1 - S)
    x = budget.spread(D, w, S, S - lam, S + lam, falling)
    assert S - lam <= x.min() and x.max() <= S + lam
    assert weighted_mean(x, w) == pytest.approx(S, abs=1e-12)
    steps = x[D.argsort(stable=True)].diff()
    assert ((steps <= 0) if falling else (steps >= 0)).all()
    for i in range(len(D)):
        assert (x[D[i] == D] == x[i]).all(), "equal scores, equal values"


@given(layers, st.floats(0, 1), st.floats(0, 0.5))
def test_equal_scores_give_the_uniform_allocation(drawn, S, lam):
    _, w = tensors(drawn)
    lam = min(lam, S, 1 - S)
    x = budget.spread(torch.full_like(w, 3.0), w, S, S - lam, S + lam, True)
    torch.testing.assert_close(x, torch.full_like(x, S), atol=1e-12, rtol=0)
    assert (budget.authors_sparsity(torch.ones(4), S, lam) == S).all()


def test_spread_where_no_end_is_met_is_linear():
    D, w = torch.tensor([0.0, 1.0, 2.0]), torch.ones(3)
    torch.testing.assert_close(
        budget.spread(D, w, 0.7, 0.6, 0.8, True), torch.tensor([0.8, 0.7, 0.6], dtype=torch.float64)
    )


@given(layers, st.floats(0, 1), st.floats(0, 1))
@example(([0.0, 0.0, 1.0], [1, 1, 1]), 0.8, 1.0)
def test_shares_raised_to_their_least_keep_the_mean(drawn, S, least_of_all):
    """By bisection: one level for all, within the limits."""
    D, w = tensors(drawn)
    x = budget.spread(D, w, S, 0.0, 1.0, False)
    least = least_of_all * torch.linspace(0, 1, len(x), dtype=torch.float64) * S
    found = budget.raised_to(least, x, w)
    low, high = -1.0, 1.0
    for _ in range(80):
        c = (low + high) / 2
        low, high = (c, high) if weighted_mean((x + c).maximum(least).clamp(max=1), w) < S else (low, c)
    expected = (x + high).maximum(least).clamp(max=1) if (x < least).any() else x
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)
    assert weighted_mean(found, w) == pytest.approx(S, abs=1e-9)


def test_authors_formula_as_they_wrote_it():
    D, S, lam = torch.tensor([4.0, 1.0, 2.0, 9.0]).double(), 0.7, 0.08
    ratio = (D - D.min()) * (1 / (D.max() - D.min()) * lam * 2)
    ratio = ratio - ratio.mean() + (1 - S)
    found = budget.authors_sparsity(D, S, lam)
    torch.testing.assert_close(found, 1 - ratio, atol=1e-15, rtol=0)
    assert float(found.mean()) == pytest.approx(S) and float(found.min()) < S - lam


@given(layers, st.integers(2, 16), st.floats(0, 1), st.floats(0, 1))
def test_rounding_moves_less_than_a_step_and_keeps_the_mean_near(drawn, M, S, share):
    D, w = tensors(drawn)
    lam = share * min(S, 1 - S)
    x = budget.spread(D, w, S, S - lam, S + lam, True)
    choices = [n / M for n in range(M + 1)]
    y = budget.round_to(x, choices, w)
    assert all(min(abs(value - choice) for choice in choices) < 1e-12 for value in y.tolist())
    assert ((y - x).abs() < 1 / M + 1e-8).all()
    assert abs(weighted_mean(y, w) - S) <= float(w.max() / w.sum()) / M / 2 + 1e-8


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.integers(0, 30))
def test_two_choices_go_by_rank(scores, upper):
    """Half 3-bit, half 4-bit: those with the highest scores get 4."""
    # Scores that differ by less than what sums lose are equal.
    assume(upper <= len(scores) and len({round(score, 6) for score in scores}) == len(scores))
    D, w = torch.tensor(scores).double(), torch.ones(len(scores)).double()
    bits = budget.round_to(budget.spread(D, w, 3 + upper / len(scores), 3, 4, False), [3, 4], w)
    assert int((bits == 4).sum()) == upper
    if 0 < upper < len(scores):
        assert D[bits == 4].min() > D[bits == 3].max()
