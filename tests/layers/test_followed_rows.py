"""Rows of tensors, followed through what models do with the tokens of experts."""

import torch

from hf_cod.layers.followed_rows import FollowedRows, Rows


class Watched(FollowedRows):
    def __init__(self):
        super().__init__()
        self.products, self.factors = [], []

    def multiplied(self, out, x, W, transposed):
        self.products.append((tuple(out.shape), transposed))

    def weighted(self, out, rows, w):
        self.factors.append(w)


def test_gathering_repeating_splitting_and_ranges():
    x, index = torch.randn(5, 4), torch.tensor([3, 1, 4])
    with Watched() as mode:
        gathered, masked = x[index], x[torch.arange(5) > 2]
        nested, again, part = x[None, index].reshape(-1, 4), gathered[torch.tensor([2, 0])], gathered[1:]
        first, second = gathered.split([1, 2])
        repeated = x.repeat(2, 1)
    found = {name: mode.rows[t].tokens.tolist() for name, t in locals().items() if name in NAMES}
    assert found == {
        "gathered": [3, 1, 4],
        "masked": [3, 4],
        "nested": [3, 1, 4],
        "again": [4, 3],
        "part": [1, 4],
        "first": [3],
        "second": [1, 4],
        "repeated": [0, 1, 2, 3, 4] * 2,
    }


NAMES = ("gathered", "masked", "nested", "again", "part", "first", "second", "repeated")


def test_what_else_is_done_is_not_followed():
    x, index = torch.randn(5, 4), torch.tensor([3, 1])
    with Watched() as mode:
        known = x[index]
        others = [x[1:3], x[index, index], known.T, known.sum(-1), torch.sigmoid(known), known * known, x[x < 1.0]]
    assert known in mode.rows and not any(t in mode.rows for t in others)


def test_factors_and_vectors():
    x, index = torch.randn(5, 4), torch.tensor([3, 1])
    with Watched() as mode:
        known = x[index]
        factors = torch.tensor([[2.0], [0.0]])
        weighted, twice = known * factors, 2 * (known + torch.ones(4)).to(torch.float64)
        factors * known, known * torch.ones(2, 4), known * torch.ones(4)
    assert [w.tolist() for w in mode.factors] == [[2.0, 0.0], [2.0, 0.0]]
    assert mode.rows[weighted].weights.tolist() == [2.0, 0.0] and mode.rows[weighted].tokens.tolist() == [3, 1]
    assert mode.rows[twice].tokens.tolist() == [3, 1] and mode.rows[twice].weights is None


def test_products_are_reported_and_tensors_forgotten():
    x, W = torch.randn(3, 4), torch.randn(4, 4)
    mode = Watched()
    with mode:
        x @ W, torch.nn.functional.linear(x, W), torch.bmm(x[None], W[None]), x.matmul(W.T)
    assert mode.products == [((3, 4), True), ((3, 4), False), ((1, 3, 4), True), ((3, 4), True)]
    mode.rows[x] = Rows(None)
    mode.forget()
    assert x not in mode.rows
