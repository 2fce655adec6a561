"""Formulas of heads and channels against loops over explicit matrices."""

import pytest
import torch

from hf_cod.functional import channels


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(X):
    ones = torch.cat([X, X.new_ones(len(X), 1)], 1)
    return ones.T @ ones


def owned(unit, count, size, parts):
    """Rows of a unit, one by one."""
    block = size // parts
    each = block // count
    return [part * block + unit * each + i for part in range(parts) for i in range(each)]


def owners(count, size, parts=1):
    """The unit of each row."""
    found = torch.full((size,), -1)
    for unit in range(count):
        found[owned(unit, count, size, parts)] = unit
    return found


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_rows_that_remain_are_those_of_kept_units_in_every_part(parts):
    kept = torch.tensor([0, 2])
    expected = sorted(row for unit in (0, 2) for row in owned(unit, 4, 24, parts))
    assert channels.rows_of(kept, owners(4, 24, parts)).tolist() == expected


def test_shared_rows_always_remain_and_count_for_no_unit():
    units = torch.tensor([0, 1, -1, 1, -1])
    assert channels.rows_of(torch.tensor([0]), units).tolist() == [0, 2, 4]
    values = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    assert channels.per_unit([(values, units), (values, units)], 3).tolist() == [2, 20, 0]


def test_magnitude():
    reader, fused, W = normal(12, 5), normal(24, 5, seed=1), normal(7, 8, seed=2)
    found = channels.magnitude([(reader, owners(4, 12)), (fused, owners(4, 24, 3))], W, owners(4, 8), 4)
    for unit in range(4):
        weights = [reader[owned(unit, 4, 12, 1)], fused[owned(unit, 4, 24, 3)], W[:, owned(unit, 4, 8, 1)]]
        assert float(found[unit]) == pytest.approx(torch.cat([w.flatten() for w in weights]).norm().item())


def test_fluctuation_is_the_variance_of_inputs_times_squared_norms():
    X, W = 3 + normal(50, 8), normal(7, 8, seed=1)
    found = channels.fluctuation(W, moments(X), owners(4, 8), 4)
    for unit in range(4):
        columns = owned(unit, 4, 8, 1)
        expected = sum(float(X[:, j].var(unbiased=False) * W[:, j].norm() ** 2) for j in columns)
        assert float(found[unit]) == pytest.approx(expected)


def test_what_stays_is_most_important_and_of_equals_the_first():
    assert channels.largest(torch.tensor([1.0, 3.0, 1.0, 2.0, 1.0]), 3).tolist() == [0, 1, 3]


@pytest.mark.parametrize("tokens", [50, 3])
def test_least_squares_against_explicit_matrices(tokens):
    """Ridge regression as rows below the others, also where tokens are fewer than columns."""
    X, W = normal(tokens, 8), normal(7, 8, seed=1)
    k, r, damping = torch.tensor([0, 2, 3, 7]), torch.tensor([1, 4, 5, 6]), 0.03
    scale = damping**0.5 * X[:, k].norm(dim=0)
    left = torch.cat([X[:, k], torch.diag(scale)])
    right = torch.cat([X[:, r] @ W[:, r].T, torch.zeros(4, 7, dtype=X.dtype)])
    expected = W[:, k] + torch.linalg.lstsq(left, right).solution.T
    found, bias = channels.least_squares(W, moments(X), k, damping)
    torch.testing.assert_close(found, expected)
    assert bias is None


def test_undamped_it_is_the_formula_with_all_columns():
    X, W, k = normal(50, 8), normal(7, 8, seed=1), torch.tensor([0, 2, 3, 7])
    H = X.T @ X
    found, _ = channels.least_squares(W, moments(X), k, 1e-12)
    torch.testing.assert_close(found, W @ H[:, k] @ torch.linalg.inv(H[k][:, k]))


def test_what_goes_without_effect_changes_nothing():
    X, W, k = normal(50, 8), normal(7, 8, seed=1), torch.tensor([0, 2, 3, 7])
    silent, unheard = X.clone(), W.clone()
    silent[:, [1, 4, 5, 6]] = 0
    unheard[:, [1, 4, 5, 6]] = 0
    assert torch.equal(channels.least_squares(W, moments(silent), k)[0], W[:, k])
    assert torch.equal(channels.least_squares(unheard, moments(X), k)[0], W[:, k])
    assert torch.equal(channels.least_squares(W, moments(torch.zeros(5, 8).double()), k)[0], W[:, k])


def test_the_bias_is_the_mean_of_what_goes():
    X, W, k = 2 + normal(50, 8), normal(7, 8, seed=1), torch.tensor([0, 2, 3, 7])
    kept, bias = channels.mean_bias(W, moments(X), k)
    torch.testing.assert_close(bias, (X[:, [1, 4, 5, 6]] @ W[:, [1, 4, 5, 6]].T).mean(0))
    assert torch.equal(kept, W[:, k])


@pytest.mark.parametrize("compensate", [channels.least_squares, channels.mean_bias, channels.drop])
def test_lost_energy_against_outputs(compensate):
    X, W, k = 2 + normal(50, 8), normal(7, 8, seed=1), torch.tensor([0, 2, 3, 7])
    kept, bias = compensate(W, moments(X), k)
    before = X @ W.T
    after = X[:, k] @ kept.T + (0 if bias is None else bias)
    expected = float((before - after).square().sum() / before.square().sum())
    assert channels.lost_energy(W, moments(X), k, kept, bias) == pytest.approx(expected)


def test_least_squares_loses_least():
    X, W, k = 2 + normal(50, 8), normal(7, 8, seed=1), torch.tensor([0, 2, 3, 7])
    M = moments(X)
    lost = [channels.lost_energy(W, M, k, *f(W, M, k)) for f in (channels.least_squares, channels.drop)]
    assert lost[0] < lost[1] / 2
    assert channels.lost_energy(torch.zeros_like(W), M, k, W[:, k] * 0, None) == 0
