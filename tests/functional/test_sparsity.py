import pytest
import torch

from hf_cod.functional.sparsity import (
    inverse_factor,
    lowest,
    lowest_in_groups,
    magnitude_mask,
    sparsegpt,
    wanda_mask,
    zero_counts,
)
from tests import references

SPARSITIES = [0, 0.1, 0.5, 0.7, 0.97, 1]


def inputs(tokens, width):
    """Correlated channels of very different size, as hidden states have them."""
    return torch.randn(tokens, width) @ torch.randn(width, width) * torch.logspace(-1, 1, width)


@pytest.mark.parametrize("S", SPARSITIES)
@pytest.mark.parametrize("shape", [(1, 1), (7, 30), (30, 7)])
def test_zeros_are_counted_exactly(shape, S):
    counts = zero_counts(*shape, S)
    assert counts.sum() == int(S * shape[0] * shape[1] + 0.5)
    assert counts.max() - counts.min() <= 1 and counts.min() >= 0 and counts.max() <= shape[1]
    W = torch.randn(shape)
    assert magnitude_mask(W, S).sum() == counts.sum()
    assert torch.equal(wanda_mask(W, torch.rand(shape[1]) + 0.1, S).sum(1), counts)


@pytest.mark.parametrize("S", SPARSITIES)
def test_masks_against_loops(S):
    W, s = torch.randn(9, 20), torch.rand(20)
    assert torch.equal(wanda_mask(W, s, S), references.wanda_mask(W, s, S))
    assert torch.equal(magnitude_mask(W, S), references.magnitude_mask(W, S))


@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (4, 8), (5, 8), (0, 4), (4, 4), (1, 3)])
def test_patterns_against_loops(pattern):
    W, s = torch.randn(5, 24), torch.rand(24)
    assert torch.equal(wanda_mask(W, s, 0.5, pattern), references.group_mask(W.abs() * s, *pattern))
    assert torch.equal(magnitude_mask(W, 0.5, pattern), references.group_mask(W.abs(), *pattern))


def test_ties_leave_the_last():
    ones = torch.ones(2, 8)
    assert lowest(ones, torch.tensor([3, 0])).tolist() == [[True] * 3 + [False] * 5, [False] * 8]
    assert lowest_in_groups(ones, (1, 4)).tolist() == [[True, True, True, False] * 2] * 2
    some = torch.tensor([[1.0, 0, 2, 0, 0]])
    assert lowest(some, torch.tensor([2])).tolist() == [[False, True, False, True, False]]


def test_channels_that_are_always_zero_go_first():
    W, s = torch.randn(6, 10), torch.ones(10)
    s[3] = 0
    assert wanda_mask(W, s, 0.1)[:, 3].all()
    X = inputs(40, 10)
    X[:, 3] = 0
    pruned = sparsegpt(W, X.T @ X, 0.1)
    assert (pruned[:, 3] == 0).all() and torch.equal(pruned[:, :3], W[:, :3])
    assert torch.equal(sparsegpt(W, X.T @ X, 0.0), W), "nothing goes that was not asked for"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_compared_wide(dtype):
    W, s = torch.randn(9, 20).to(dtype), torch.rand(20)
    high = torch.promote_types(dtype, torch.float32)
    assert torch.equal(wanda_mask(W, s, 0.6), references.wanda_mask(W.to(high), s.to(high), 0.6))
    assert torch.equal(magnitude_mask(W, 0.6), references.magnitude_mask(W.to(high), 0.6))
    H = torch.eye(20) + 0.1
    found = sparsegpt(W, H, 0.6)
    assert found.dtype == high
    torch.testing.assert_close(found, sparsegpt(W.to(high), H, 0.6))


def test_inverse_factor():
    X = inputs(50, 12).double()
    H = X.T @ X
    U = inverse_factor(H, 0.01)
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(12, dtype=H.dtype)
    torch.testing.assert_close(U.T @ U, damped.inverse(), rtol=1e-8, atol=0)
    assert torch.equal(U, U.triu())
    # The float32 factor of a matrix of rank 2 needs its damping.
    thin = inputs(2, 12)
    assert inverse_factor(thin.T @ thin, 1e-9).isfinite().all()
    with pytest.raises(ValueError, match="activations: expected finite sums"):
        inverse_factor(torch.full((3, 3), torch.nan), 0.01)


@pytest.mark.parametrize("pattern", [None, (2, 4), (3, 8)])
@pytest.mark.parametrize("S", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("block", [8, 24, 100])
def test_sparsegpt_against_the_optimal_brain_surgeon(block, S, pattern):
    W, X = torch.randn(5, 48).double(), inputs(60, 48).double()
    H = X.T @ X
    found = sparsegpt(W, H, S, pattern, block=block)
    expected = references.optimal_brain_surgeon(W, H, S, pattern, 0.01, block)
    assert torch.equal(found == 0, expected == 0)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
    if pattern is None:
        assert (found == 0).sum() == int(S * W.numel() + 0.5)
    else:
        assert ((found == 0).view(5, -1, pattern[1]).sum(-1) == pattern[1] - pattern[0]).all()


def test_sparsegpt_loses_least():
    W, X = torch.randn(16, 64), inputs(200, 64)
    H, s = X.T @ X, X.norm(dim=0)
    before = W.clone()

    def error(pruned):
        return float((X @ (pruned - W).T).square().sum())

    by_solve, by_wanda = error(sparsegpt(W, H, 0.5)), error(W.masked_fill(wanda_mask(W, s, 0.5), 0))
    assert by_solve < by_wanda < error(W.masked_fill(magnitude_mask(W, 0.5), 0))
    assert torch.equal(W, before), "the weights that were given are left alone"
