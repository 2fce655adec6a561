import pytest
import torch

from hf_cod.functional.low_rank import change_basis, gradient_basis, is_tall, lift, project
from hf_cod.functional.randomness import generator_of


def decaying(m, n, seed=0):
    """A matrix whose singular values fall as those of gradients do."""
    random = torch.Generator().manual_seed(seed)
    U = torch.linalg.qr(torch.randn(m, min(m, n), generator=random, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(n, min(m, n), generator=random, dtype=torch.float64)).Q
    return U * (1 / torch.arange(1, min(m, n) + 1, dtype=torch.float64)) @ V.T


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (40, 40)])
@pytest.mark.parametrize("r", [1, 8, 40])
def test_basis_is_orthonormal_and_holds_nearly_the_energy_of_an_svd(shape, r):
    G = decaying(*shape)
    P = gradient_basis(G, r, generator_of(0))
    assert P.shape == (40, r) and P.is_contiguous()
    torch.testing.assert_close(P.T @ P, torch.eye(r, dtype=P.dtype))
    best = torch.linalg.svdvals(G)[:r].square().sum()
    held = project(G, P).square().sum()
    assert best * 0.99 <= held <= best * (1 + 1e-9)
    back = lift(project(G, P), P, is_tall(G))
    assert (G - back).square().sum() == pytest.approx(float(G.square().sum() - held), abs=1e-9)


def test_banks_of_experts_have_a_basis_each():
    G = torch.stack([decaying(20, 30, seed) for seed in range(3)])
    P = gradient_basis(G, 5, generator_of(1))
    for expert in range(3):
        # The same subspace as alone, whatever the basis in it.
        alone = gradient_basis(G[expert], 5, generator_of(1))
        torch.testing.assert_close(P[expert] @ P[expert].T, alone @ alone.T)


def test_low_precision_is_solved_in_float32_and_zeros_are_no_trouble():
    assert gradient_basis(decaying(9, 5).bfloat16(), 2, generator_of(0)).dtype == torch.float32
    P = gradient_basis(torch.zeros(9, 5), 2, generator_of(0))
    torch.testing.assert_close(P.T @ P, torch.eye(2))


@pytest.mark.parametrize("shape", [(60, 40), (40, 60)])
def test_moments_in_another_basis_of_the_same_space(shape):
    """A permuted basis moves both moments exactly; a turned one moves the mean exactly."""
    G = decaying(*shape)
    old = gradient_basis(G, 6, generator_of(0))
    order = torch.tensor([3, 1, 0, 5, 4, 2])
    M, V = project(G, old), project(G, old).square()
    moved = change_basis(M, V, old, old[:, order], is_tall(G))
    torch.testing.assert_close(moved[0], project(G, old[:, order]))
    torch.testing.assert_close(moved[1], project(G, old[:, order]).square())
    turned = old @ torch.linalg.qr(torch.randn(6, 6, dtype=old.dtype, generator=generator_of(2))).Q
    mean, square = change_basis(M, V, old, turned, is_tall(G))
    torch.testing.assert_close(mean, project(G, turned))
    assert (square >= 0).all() and square.sum() == pytest.approx(float(V.sum()))  # energy stays


def test_generators_depend_on_their_counts_alone():
    numbers = {torch.randint(1 << 40, (), generator=generator_of(*c)).item() for c in [(0,), (0, 0), (0, 1), (1, 0)]}
    assert len(numbers) == 4
    a, b = (torch.rand(3, generator=generator_of(5, 7)) for _ in range(2))
    assert torch.equal(a, b)
