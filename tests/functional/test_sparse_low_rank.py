import pytest
import torch

from hf_cod.functional.sparse_low_rank import decompose, sizes_of_weights
from tests import references


def problem(m, n, seed=0):
    random = torch.Generator().manual_seed(seed)
    W = torch.randn(m, n, generator=random, dtype=torch.float64)
    X = torch.randn(200, n, generator=random, dtype=torch.float64) * torch.logspace(-1, 1, n, dtype=torch.float64)
    return W, X.T @ X


@pytest.mark.parametrize("shape", [(30, 20), (20, 30)])
def test_one_iteration_is_the_formula(shape):
    W, H = problem(*shape)
    S, L = references.oats(W, H, 4, 5, 1)
    sparse, B, A, lost = decompose(W, 4, 5 * shape[0], H, iterations=1)
    torch.testing.assert_close(sparse, S)
    torch.testing.assert_close(B @ A, L)
    E = W - sparse - B @ A
    assert lost == pytest.approx(float((E @ H * E).sum() / (W @ H * W).sum()))


@pytest.mark.parametrize("shape", [(30, 20), (20, 30)])
def test_many_iterations_come_as_near_as_with_an_svd_each(shape):
    """Either way ends in one of many minima, and either may be the lower one: so it is the mean that counts."""
    found = []
    for seed in range(4):
        W, H = problem(*shape, seed)
        D = H.diagonal().sqrt()
        once, more = ((W - S - L) * D for S, L in (references.oats(W, H, 4, 5, N) for N in (1, 20)))
        S, B, A, _ = decompose(W, 4, 5 * shape[0], H, 20)
        assert ((S != 0).sum(1) == 5).all()
        found.append([((W - S - B @ A) * D).norm() / other.norm() for other in (once, more)])
    of_once, of_more = torch.tensor(found).mean(0)
    assert of_once < 0.9 and of_more < 1.03


def test_the_norm_never_grows():
    W, H = problem(30, 20)
    D, norms = H.diagonal().sqrt(), []
    for iterations in range(1, 12):
        S, B, A, _ = decompose(W, 4, 150, H, iterations)
        norms.append(float(((W - S - B @ A) * D).norm()))
    assert norms == sorted(norms, reverse=True) and norms[-1] < 0.9 * norms[0]


def test_dead_channels_and_zeros_are_no_trouble():
    W, H = problem(30, 20)
    H[3], H[:, 3] = 0, 0
    for weights, products in ((W, H), (W, torch.zeros_like(H)), (torch.zeros_like(W), H)):
        S, B, A, lost = decompose(weights, 4, 150, products)
        assert all(bool(part.isfinite().all()) for part in (S, B, A)) and 0 <= lost < 1


@pytest.mark.parametrize("shape", [(30, 20), (64, 48), (576, 1536)])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_sizes_spend_the_whole_share(shape, share):
    m, n = shape
    r, k = sizes_of_weights(shape, share, 0.25)
    assert r == max(1, int(0.25 * share * m * n / (m + n))) and r * (m + n) + k == int(share * m * n + 1e-9)
    assert sizes_of_weights(shape, 1.0, 0.25) is None and sizes_of_weights((2, 2), 0.5, 0.25) is None
