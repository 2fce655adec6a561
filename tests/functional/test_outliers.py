import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_cod.functional import outliers
from tests import references

SHAPES = [(7, 5), (1, 9), (64, 33)]


def layer(seed=0, dtype=torch.float32):
    """Matrices and inputs with a few loud channels."""
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for rows, columns in SHAPES:
        X = torch.randn(20, columns, generator=generator) * torch.rand(columns, generator=generator).exp().pow(3)
        pairs.append((torch.randn(rows, columns, generator=generator).to(dtype), X))
    return pairs


def given_to_ours(pairs):
    return lambda: ((str(i), W, X.double().norm(dim=0)) for i, (W, X) in enumerate(pairs))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("M", [0.5, 1, 3, 5, 7, 10])
def test_outlier_ratio_against_whole_matrices(M, dtype, monkeypatch):
    monkeypatch.setattr(outliers, "CHUNK", 64)  # several chunks
    pairs = layer(dtype=dtype)
    assert outliers.outlier_ratio(given_to_ours(pairs), M) == pytest.approx(
        references.outlier_ratio(pairs, M), abs=1e-6
    )


def test_per_module_compares_each_with_its_own_mean():
    pairs = layer()
    sizes = [W.numel() for W, _ in pairs]
    each = [references.outlier_ratio([pair], 3) for pair in pairs]
    expected = sum(n * d for n, d in zip(sizes, each, strict=True)) / sum(sizes)
    assert outliers.outlier_ratio(given_to_ours(pairs), 3, per_module=True) == pytest.approx(expected, abs=1e-9)
    assert outliers.outlier_ratio(given_to_ours(pairs), 3) != pytest.approx(expected, abs=1e-3)


def test_channels_that_are_always_zero():
    W = torch.tensor([[1.0, 100.0], [3.0, 100.0]])
    s = torch.tensor([1.0, 0.0])
    # A is 1, 0, 3, 0 with the mean 1: only 3 exceeds it twofold.
    assert outliers.outlier_ratio(lambda: [("", W, s)], 2) == 0.25
    assert outliers.outlier_ratio(lambda: [("", W, torch.zeros(2))], 2) == 0
    assert outliers.outlier_ratio(lambda: [("", torch.zeros(2, 2), s)], 2) == 0


@given(st.floats(1e-3, 1e3), st.integers(0, 50))
def test_a_common_factor_of_the_inputs_changes_nothing(factor, seed):
    pairs = layer(seed)
    scaled = [(W, X.double() * factor) for W, X in pairs]
    plain, other = (outliers.outlier_ratio(given_to_ours(p), 3) for p in (pairs, scaled))
    assert other == pytest.approx(plain, abs=2 / sum(W.numel() for W, _ in pairs))


def test_comparisons_are_those_of_float64():
    w = torch.tensor([[1.0, 1.0 + 2**-23]])  # neighbours in float32
    s = torch.ones(2, dtype=torch.float64)
    for bound, expected in [(1.0 - 1e-12, 2), (1.0, 1), (1.0 + 1e-12, 1), (1.0 + 2**-23, 0), (1.0 + 2**-23 - 1e-12, 1)]:
        assert outliers.count_above(w, s, bound) == expected


def test_not_finite_weights_name_their_matrix():
    for wrong in (math.nan, math.inf):
        matrices = [("first", torch.ones(2, 2), torch.ones(2)), ("second", torch.full((2, 2), wrong), torch.ones(2))]
        with pytest.raises(ValueError, match="weights: expected finite numbers, got NaN or infinity in second"):
            outliers.outlier_ratio(lambda rows=matrices: rows, 5)
    with pytest.raises(ValueError, match="matrices: expected at least one weight"):
        outliers.outlier_ratio(lambda: [], 5)


def test_mean_importance_of_ones_is_the_mean_magnitude():
    matrices = [("", W, torch.ones(W.shape[1])) for W, _ in layer()]
    expected = torch.cat([W.abs().flatten() for _, W, _ in matrices]).double().mean()
    assert outliers.mean_importance(matrices) == pytest.approx(float(expected), rel=1e-6)
