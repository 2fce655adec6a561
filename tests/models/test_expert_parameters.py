"""Products with views of packed matrices of experts are those with the parameter; other uses are refused."""

import pytest
import torch
from torch.nn import functional
from transformers.integrations.moe import _grouped_mm_fallback

from hf_cod.models.expert_parameters import ExpertParameter

EXPERTS, OUT, IN = 3, 4, 6


class Kept(ExpertParameter):
    """Holds the matrices as they are, (experts, out, in)."""

    def __init__(self, shape, transposed, W):
        super().__init__(torch.Size(shape), EXPERTS, transposed, 0, W.dtype)
        self.weight = torch.nn.Parameter(W, requires_grad=False)
        self.asked = []

    def forward(self):
        return self.weight

    def product(self, tensors, x, expert):
        self.asked.append((expert, len(x)))
        return x @ tensors[expert].T

    def decoded(self, tensors, expert, dtype):
        return tensors[expert].to(dtype)


def pair(transposed=False, stacked=False):
    """(the parameter as a model stores it, the module in its place)."""
    W = torch.randn(EXPERTS, OUT, IN, generator=torch.Generator().manual_seed(0))
    stored = (W.mT if transposed else W).contiguous()
    stored = stored.flatten(0, 1) if stacked else stored
    return stored, Kept(stored.shape, transposed, W)


def same(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("turned", [False, True])
def test_one_matrix(transposed, turned):
    """Also multiplied the other way, as by a model whose orientation was misjudged."""
    stored, module = pair(transposed)
    for index in (1, torch.tensor(2), -1):
        W, M = stored[index], module[index]
        W, M = (W.T, M.T) if turned else (W, M)
        assert M.shape == W.shape and M.dim() == 2 and len(M) == len(W) and M.dtype == W.dtype
        x, b = torch.randn(2, 5, W.shape[0]), torch.randn(W.shape[1])
        same(x @ M, x @ W)
        same(torch.matmul(x[0], M), x[0] @ W)
        same(torch.mm(x[0], M), x[0] @ W)
        same(functional.linear(x, M.t(), b), functional.linear(x, W.T, b))
        same(torch.einsum("ij,bti->btj", M, x), torch.einsum("ij,bti->btj", W, x))  # decodes one matrix
        same(M.transpose(-2, -1) @ x[0].T, W.T @ x[0].T)


@pytest.mark.parametrize("transposed", [False, True])
def test_all_matrices(transposed):
    stored, module = pair(transposed)
    x = torch.randn(EXPERTS, 5, stored.shape[1])
    x[1] = 0
    x[2, 3] = 0
    same(torch.bmm(x, module), torch.bmm(x, stored))
    assert not transposed or module.asked == [(0, 5), (2, 4)], "tokens of other experts are zeros"
    same(torch.bmm(module.transpose(1, 2), x.mT), torch.bmm(stored.mT, x.mT))
    chosen = torch.tensor([2, 0, 2, 2])
    same(torch.bmm(x[chosen], module[chosen]), torch.bmm(x[chosen], stored[chosen]))
    y = torch.randn(4, stored.shape[2], 1)
    same(torch.bmm(module[chosen], y), torch.bmm(stored[chosen], y))
    assert (len(module), module.dim(), module.numel(), module.shape) == (3, 3, stored.numel(), stored.shape)


@pytest.mark.parametrize("transposed", [False, True])
def test_grouped(transposed):
    stored, module = pair(transposed)
    stored, view = (stored, module) if transposed else (stored.mT, module.transpose(-2, -1))
    x, ends = torch.randn(7, IN), torch.tensor([3, 3, 5], dtype=torch.int32)
    expected = _grouped_mm_fallback(x, stored, ends)
    same(functional.grouped_mm(x, view, offs=ends), expected)
    same(torch.ops.transformers.grouped_mm_fallback(x, view, offs=ends), expected)
    assert not expected[5:].any() and {expert for expert, _ in module.asked} == {0, 2}


def test_a_stack_is_viewed_before_it_is_used():
    stored, module = pair(stacked=True)
    x = torch.randn(5, IN)
    same(x @ module.view(-1, OUT, IN)[1].T, x @ stored.view(-1, OUT, IN)[1].T)
    same(x @ module.view((EXPERTS, OUT, IN))[1].T, x @ stored.view(-1, OUT, IN)[1].T)
    with pytest.raises(ValueError, match=r"experts: expected a view as \(3, 4, 6\) of packed matrices, got \(6, 12\)"):
        module.view(6, 12)


def test_gradients_reach_tokens_that_are_zeros():
    stored, module = pair(transposed=True)
    x = torch.randn(EXPERTS, 5, IN)
    x[1] = 0
    found, expected = (x.clone().requires_grad_() for _ in range(2))
    torch.bmm(found, module).square().add(torch.bmm(found, module)).sum().backward()
    torch.bmm(expected, stored).square().add(torch.bmm(expected, stored)).sum().backward()
    same(found.grad, expected.grad)
    assert found.grad[1].any()


def test_the_dtype_follows_the_model():
    _, module = pair()
    assert module.to(torch.bfloat16).dtype == module[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    "use, message",
    [
        (lambda m: torch.einsum("eoi,ni->no", m, torch.ones(2, IN)), "got another use of all of them"),
        (lambda m: m[0][1], "expected an index of experts, got one into the matrices of 0"),
        (lambda m: m.transpose(0, 1), "expected rows and columns to be exchanged, got 0 and 1"),
    ],
)
def test_other_uses(use, message):
    with pytest.raises(ValueError, match=f"experts: .*{message}"):
        use(pair()[1])
