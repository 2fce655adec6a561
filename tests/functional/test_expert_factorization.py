"""Factors that experts share, against singular value decompositions of the matrices side by side."""

import pytest
import torch

from hf_cod.functional.expert_factorization import (
    expand_spectrum,
    lost_share,
    reduce_spectrum,
    shared_expand,
    shared_reduce,
)
from hf_cod.functional.factorization import DAMPING

EXPERTS = 4


def example(out=6, width=10, without=()):
    """(W, H): experts with inputs of different sizes, more tokens than channels."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(EXPERTS, out, width, generator=generator, dtype=torch.float64)
    X = torch.randn(EXPERTS, 30, width, generator=generator, dtype=torch.float64)
    X = X * torch.rand(EXPERTS, 1, width, generator=generator, dtype=torch.float64)
    return W, [None if e in without else X[e].T @ X[e] for e in range(EXPERTS)]


def damped(H):
    return H + DAMPING * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)


@pytest.mark.parametrize("shape", [(6, 10), (10, 6)])
@pytest.mark.parametrize("without", [(), (1,), range(EXPERTS)])
def test_one_expand_is_the_best_basis_of_whitened_matrices_side_by_side(shape, without):
    W, H = example(*shape, without)
    means = [float(each.diagonal().mean()) for each in H if each is not None]
    usual = DAMPING * sum(means) / len(means) if means else 1.0
    filled = [usual * torch.eye(shape[1], dtype=W.dtype) if each is None else damped(each) for each in H]
    sides = torch.cat([W_e @ torch.linalg.cholesky(each) for W_e, each in zip(W, filled, strict=True)], 1)
    U, S, _ = torch.linalg.svd(sides, full_matrices=False)
    B, A = shared_expand(W, 3, H)
    assert B.shape == (shape[0], 3) and A.shape == (EXPERTS, 3, shape[1])
    torch.testing.assert_close(B @ A, U[:, :3] @ U[:, :3].T @ W)
    torch.testing.assert_close(B.norm(dim=0), A.square().sum((0, 2)).sqrt())
    torch.testing.assert_close(expand_spectrum(W, H), S.square())


@pytest.mark.parametrize("shape", [(6, 10), (10, 6)])
@pytest.mark.parametrize("without", [(), (1,), range(EXPERTS)])
def test_one_reduce_is_the_best_basis_for_common_inputs_and_each_expand_is_fitted(shape, without):
    W, H = example(*shape, without)
    known = [each for each in H if each is not None]
    common = damped(torch.stack(known).sum(0)) if known else torch.eye(shape[1], dtype=W.dtype)
    L, total = torch.linalg.cholesky(common), sum(float(each.trace()) for each in known)
    shares = [DAMPING / EXPERTS if each is None else float(each.trace()) / total for each in H] if known else [1] * 4
    below = torch.cat([share**0.5 * W_e @ L for W_e, share in zip(W, shares, strict=True)])
    _, S, Vh = torch.linalg.svd(below, full_matrices=False)
    C = Vh[:3] @ torch.linalg.inv(L)
    fitted = [
        W_e @ M @ C.T @ torch.linalg.inv(C @ M @ C.T) @ C
        for W_e, M in zip(W, [common if each is None else damped(each) for each in H], strict=True)
    ]
    B, A = shared_reduce(W, 3, H)
    assert B.shape == (EXPERTS, shape[0], 3) and A.shape == (3, shape[1])
    torch.testing.assert_close(B @ A, torch.stack(fitted))
    torch.testing.assert_close(reduce_spectrum(W, H), S.square())


@pytest.mark.parametrize("make, rank", [(shared_expand, 6), (shared_reduce, 10)])
def test_full_rank_loses_nothing(make, rank):
    W, H = example()
    B, A = make(W, rank, H)
    torch.testing.assert_close(B @ A, W)
    assert lost_share(W, B, A, H) < 1e-20


def test_the_lost_share_is_that_of_experts_with_tokens():
    W, H = example(without=(1,))
    B, A = shared_expand(W, 2, H)
    seen = [e for e in range(EXPERTS) if e != 1]
    lost = sum(torch.trace((W[e] - B @ A[e]) @ H[e] @ (W[e] - B @ A[e]).T) for e in seen)
    assert lost_share(W, B, A, H) == pytest.approx(float(lost / sum(torch.trace(W[e] @ H[e] @ W[e].T) for e in seen)))
    plain = (W - B @ A).square().sum() / W.square().sum()
    assert lost_share(W, B, A, [None] * EXPERTS) == pytest.approx(float(plain))
    assert lost_share(W * 0, B * 0, A, H) == 0
