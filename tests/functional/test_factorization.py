import pytest
import torch

from hf_cod.functional.factorization import DAMPING, factorize, spectrum
from tests import references


def problem(m, n, tokens, seed=0):
    """W and H with channels of very different size, as activations have."""
    random = torch.Generator().manual_seed(seed)
    W = torch.randn(m, n, generator=random, dtype=torch.float64)
    X = torch.randn(tokens, n, generator=random, dtype=torch.float64) * torch.logspace(-2, 1, n, dtype=torch.float64)
    return W, X, X.T @ X


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (20, 20)])
@pytest.mark.parametrize("tokens", [200, 7])
@pytest.mark.parametrize("r", [1, 6, 20])
def test_whitened_is_the_truncated_svd_of_w_l(shape, tokens, r):
    W, _, H = problem(*shape, tokens)
    B, A, lost = factorize(W, r, H)
    expected, energies = references.whitened_svd(W, H, r, DAMPING)
    torch.testing.assert_close(B @ A, expected)
    assert B.shape == (shape[0], r) and A.shape == (r, shape[1])
    torch.testing.assert_close(spectrum(W, H), energies)
    assert lost == pytest.approx(float(energies[r:].sum() / energies.sum()), abs=1e-9)


@pytest.mark.parametrize("shape", [(30, 20), (20, 30)])
def test_outputs_change_less_than_by_the_plain_decomposition_and_by_what_is_told(shape):
    W, X, H = problem(*shape, 500)
    whitened, plain = (torch.linalg.matrix_norm(X @ (W - B @ A).T) for B, A, _ in (factorize(W, 5, H), factorize(W, 5)))
    assert whitened < 0.9 * plain
    _, _, lost = factorize(W, 5, H, damping=1e-9)
    B, A, _ = factorize(W, 5, H, damping=1e-9)
    error = torch.linalg.matrix_norm(X @ (W - B @ A).T) ** 2
    assert float(error / torch.linalg.matrix_norm(X @ W.T) ** 2) == pytest.approx(lost, rel=1e-4)


@pytest.mark.parametrize("shape", [(30, 20), (20, 30)])
def test_plain_is_the_truncated_svd_of_w(shape):
    W, _, _ = problem(*shape, 9)
    U, S, V = torch.linalg.svd(W, full_matrices=False)
    B, A, _ = factorize(W, 4)
    torch.testing.assert_close(B @ A, U[:, :4] * S[:4] @ V[:4])
    torch.testing.assert_close(spectrum(W), S.square())


@pytest.mark.parametrize("shape", [(30, 20), (20, 30)])
def test_zeros_and_dead_channels_are_no_trouble(shape):
    W, X, _ = problem(*shape, 50)
    X[:, 3:9] = 0
    for weights, H in ((W, X.T @ X), (W, torch.zeros(shape[1], shape[1])), (torch.zeros_like(W), X.T @ X)):
        B, A, lost = factorize(weights, 20, H)
        torch.testing.assert_close(B @ A, weights, atol=1e-9, rtol=0)
        assert 0 <= lost < 1e-9
    # Inputs that are all zero say nothing of W: what they leave is the plain decomposition, of a wide one, too.
    B, A, _ = factorize(W, 5, torch.zeros(shape[1], shape[1]))
    expected, more, _ = factorize(W, 5)
    torch.testing.assert_close(B @ A, expected @ more)
    # Channels that are always zero are not worth a rank: those that live are kept.
    B, A, _ = factorize(W, 14, X.T @ X)
    assert float((X @ (W - B @ A).T).norm() / (X @ W.T).norm()) < 0.02


def test_factors_have_equal_norms_and_survive_bfloat16():
    W, _, H = problem(30, 20, 100)
    B, A, _ = factorize(W.bfloat16(), 6, H.float())
    torch.testing.assert_close(B.norm(dim=0), A.norm(dim=1))
    assert B.dtype == torch.float64
