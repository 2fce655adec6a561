import pytest
import torch

from hf_cod.functional import scale_fit
from hf_cod.functional.scale_fit import fitted_scales

BLOCK = 4


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    Z = torch.randint(-4, 4, (5, 12), generator=generator).double()
    X = torch.randn(40, 12, generator=generator, dtype=torch.float64)
    return W, Z, X


def test_least_squares_of_each_row(case, monkeypatch):
    """The regression of X w on one column for each block: the inputs of the block times its codes."""
    monkeypatch.setattr(scale_fit, "CHUNK", 24)  # two rows at a time
    W, Z, X = case
    s = fitted_scales(W, Z, X.T @ X, BLOCK, damping=1e-12)
    for i in range(5):
        columns = torch.stack([X[:, g : g + BLOCK] @ Z[i, g : g + BLOCK] for g in range(0, 12, BLOCK)], 1)
        expected = torch.linalg.lstsq(columns, X @ W[i]).solution
        torch.testing.assert_close(s[i], expected, rtol=1e-4, atol=1e-6)


def test_a_block_of_zeros_and_no_inputs_have_finite_scales(case):
    W, Z, X = case
    Z[2, 4:8] = 0
    assert fitted_scales(W, Z, X.T @ X, BLOCK, 0.01).isfinite().all()
    assert fitted_scales(W, Z * 0, X.T @ X * 0, BLOCK, 0.01).isfinite().all()
