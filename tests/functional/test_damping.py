"""Cholesky factors of sums of products that have no full rank."""

import pytest
import torch

from hf_cod.functional.damping import MORE_DAMPING, damped_cholesky, shrunk


def test_the_factor_of_a_damped_matrix():
    X = torch.randn(4, 6, dtype=torch.float64)
    H = X.T @ X  # rank 4 of 6
    before = H.clone()
    L = damped_cholesky(H, 0.01)
    torch.testing.assert_close(L @ L.T, H + 0.01 * H.diagonal().mean() * torch.eye(6, dtype=H.dtype))
    assert torch.equal(L, L.tril()) and torch.equal(H, before)


def test_nothing_seen_counts_as_one():
    torch.testing.assert_close(damped_cholesky(torch.zeros(3, 3), 0.25), 0.5 * torch.eye(3))


def test_damping_grows_until_the_matrix_is_definite():
    H = torch.diag(torch.tensor([4.0, 4.0, -2.0], dtype=torch.float64))  # mean 2: 0.1 and 1 are not enough
    L = damped_cholesky(H, 0.1)
    torch.testing.assert_close(L @ L.T, H + 20 * torch.eye(3, dtype=H.dtype))
    assert MORE_DAMPING >= 2


def test_what_no_damping_mends():
    with pytest.raises(ValueError, match="activations: expected finite sums of products"):
        damped_cholesky(torch.full((2, 2), float("nan")), 0.1)


def test_sums_of_few_tokens_are_moved_towards_their_diagonal():
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    H = x.T @ x
    found = shrunk(H, 3)
    for i in range(6):
        for j in range(6):
            assert abs(float(found[i, j]) - float(H[i, j]) * (3 if i == j else 1)) < 1e-12
    assert torch.linalg.eigvalsh(found)[0] > 1e-3 > torch.linalg.eigvalsh(H)[0]
