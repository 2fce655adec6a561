"""Which way round matrices are stored: Linear as (out, in), Conv1D as (in, out), and one view of both."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_cod.layers.orientation import (
    computes_otherwise,
    is_linear,
    is_plain,
    is_transposed,
    new_matrix,
    set_shape,
    shape_of,
    turned,
)

OUT, IN = 3, 5


class Alike(nn.Linear):
    """As Falcon's."""

    def forward(self, input):
        product = input @ self.weight.T
        return product if self.bias is None else product + self.bias


class Router(nn.Linear):
    """As Llama 4's: more than the product."""

    def forward(self, input):
        product = super().forward(input)
        return product.sigmoid(), product


class Scaled(nn.Linear):
    factor = 1.5

    def forward(self, input):
        return super().forward(input) * self.factor


class Grouped(nn.Linear):
    """As DeepSeek-V4's: each half of the rows reads its own half of the inputs."""

    def forward(self, input):
        parts = self.weight.chunk(2)
        return torch.cat([nn.functional.linear(x, W) for x, W in zip(input.chunk(2, -1), parts, strict=True)], -1)


class Clipped(nn.Linear):
    """Looks at the size of the values."""

    def forward(self, input):
        return super().forward(input.clamp(-8, 8))


class BySamples(nn.Linear):
    """Looks at the number of axes."""

    def forward(self, input):
        return super().forward(input) * (1 if input.dim() < 3 else 2)


class OfMany(nn.Linear):
    """Looks at the number of tokens."""

    def forward(self, input):
        return super().forward(input) * (1 if input.shape[-2] < 32 else 2)


class OfOne(nn.Linear):
    """Looks whether this is a step of generation."""

    def forward(self, input):
        return super().forward(input) * (2 if input.shape[-2] == 1 else 1)


class InPlace(nn.Linear):
    """Changes its input."""

    def forward(self, input):
        return super().forward(input.mul_(2))


class Noisy(nn.Linear):
    """With a further parameter, which a check cannot judge."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.noise = nn.Parameter(torch.zeros(()))


OTHERWISE = [Router, Scaled, Grouped, Clipped, BySamples, OfMany, OfOne, InPlace]


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


@pytest.mark.parametrize("kind", [Alike, Noisy, *OTHERWISE])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("biased", [True, False])
def test_subclasses_are_judged_by_what_they_compute(kind, device, biased):
    module = kind(IN, OUT).to(device)
    module.bias = module.bias if biased else None
    before = {name: p.clone() for name, p in module.named_parameters()}
    assert is_linear(module) and is_plain(module) == (kind is Alike)
    assert computes_otherwise(module) == (kind in OTHERWISE)
    if device == "cpu":
        assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())
    assert shape_of(module) == (OUT, IN)


def test_a_factor_of_the_instance_counts():
    module = Scaled(IN, OUT)
    module.factor = 1.0
    assert is_plain(module) and not computes_otherwise(module)


def test_others():
    assert not computes_otherwise(nn.Linear(IN, OUT)) and not computes_otherwise(Conv1D(OUT, IN))
    quantized = nn.Linear(IN, OUT).to(torch.float8_e4m3fn)
    quantized.__class__ = Alike
    assert not is_plain(quantized) and not computes_otherwise(quantized)
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
