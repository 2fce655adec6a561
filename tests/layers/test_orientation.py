"""Which way round matrices are stored: Linear as (out, in), Conv1D as (in, out), and one view of both."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_cod.layers.orientation import is_linear, is_plain, is_transposed, new_matrix, set_shape, shape_of, turned

OUT, IN = 3, 5


class Subclass(nn.Linear):
    pass


class Bank(nn.Module):
    """Of two experts, as transformers stores some of them."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        self.weight = nn.Parameter(torch.randn(2, *((IN, OUT) if transposed else (OUT, IN))))


@pytest.mark.parametrize("module, stored", [(nn.Linear(IN, OUT), (OUT, IN)), (Conv1D(OUT, IN), (IN, OUT))])
def test_both_kinds_are_seen_as_out_and_in(module, stored):
    assert tuple(module.weight.shape) == stored and shape_of(module) == (OUT, IN)
    assert is_plain(module) and is_linear(module) and is_transposed(module) == (stored == (IN, OUT))
    W = turned(module, module.weight)
    x = torch.randn(4, IN)
    torch.testing.assert_close(module(x), x @ W.T + module.bias)
    assert W.data_ptr() == module.weight.data_ptr(), "a view, through which the module is changed"
    assert torch.equal(turned(module, W), module.weight), "the way back"


def test_subclasses_and_others():
    assert is_linear(Subclass(IN, OUT)) and not is_plain(Subclass(IN, OUT))
    assert not is_linear(nn.Embedding(3, 3)) and not is_plain(None) and not is_transposed(nn.Embedding(3, 3))


@pytest.mark.parametrize("transposed", [False, True])
def test_banks_of_experts(transposed):
    bank = Bank(transposed)
    W = turned(bank, bank.weight)
    assert is_transposed(bank) == transposed and W.shape == (2, OUT, IN)
    assert torch.equal(W[1], bank.weight[1].T if transposed else bank.weight[1])


@pytest.mark.parametrize("transposed, kind", [(False, nn.Linear), (True, Conv1D)])
@pytest.mark.parametrize("biased", [False, True])
def test_a_new_matrix_does_what_its_weight_says(transposed, kind, biased):
    W, x = torch.randn(OUT, IN), torch.randn(4, IN)
    bias = nn.Parameter(torch.randn(OUT)) if biased else None
    made = new_matrix(W, bias, transposed)
    assert type(made) is kind and shape_of(made) == (OUT, IN) and made.bias is bias
    assert not made.weight.requires_grad and made.weight.is_contiguous()
    if biased or not transposed:  # Conv1D's own forward wants a bias
        torch.testing.assert_close(made(x), x @ W.T + (bias if biased else 0))
    assert torch.equal(turned(made, made.weight), W)


@pytest.mark.parametrize("module", [nn.Linear(IN, OUT), Conv1D(OUT, IN)])
def test_another_shape_is_noted(module):
    set_shape(module, 7, 2)
    assert shape_of(module) == (7, 2)
