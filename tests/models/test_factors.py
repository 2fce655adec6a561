"""Factors in the place of a bank's parameter, and what a config records of them."""

import pytest
import torch
from torch import nn

from hf_cod.models.expert_parameters import parameters_of
from hf_cod.models.factors import EXPERT_KEYS, LowRankExperts, build_expert_factors, recorded_experts

EXPERTS, OUT, IN = 3, 4, 6


class Bank(nn.Module):
    def __init__(self, transposed=False, stacked=False):
        super().__init__()
        size = (EXPERTS, IN, OUT) if transposed else (EXPERTS, OUT, IN)
        size = (size[0] * size[1], size[2]) if stacked else size
        self.first, self.second = nn.Parameter(torch.randn(size)), nn.Parameter(torch.randn(size))
        self.bias = nn.Parameter(torch.randn(EXPERTS, OUT))


def recorded(key="second", rank=2, **more):
    return {f"{key}.rank": rank, f"{key}.experts": EXPERTS, **{f"{key}.{name}": 1 for name in more}}


@pytest.mark.parametrize("more", [{}, {"transposed": 1}, {"shared_reduce": 1}, {"transposed": 1, "shared_expand": 1}])
@pytest.mark.parametrize("stacked", [False, True])
def test_what_is_recorded_is_built_and_multiplies_as_its_decoded_matrix(more, stacked):
    bank = Bank("transposed" in more, stacked)
    order = [key for key, _ in parameters_of(bank)]
    build_expert_factors(bank, recorded("second", **more) | recorded("first", 1, **more), "bank")
    assert [key for key, _ in parameters_of(bank)] == order
    made = bank.second
    assert recorded_experts(made, "second") == recorded(**more) and bank.first.rank == 1
    sizes = {"reduce": (2, IN), "expand": (OUT, 2)}
    sizes = {name: size if f"shared_{name}" in more else (EXPERTS, *size) for name, size in sizes.items()}
    assert {name: tuple(p.shape) for name, p in made.named_parameters()} == sizes
    assert made.numel() == sum(p.numel() for p in made.parameters())
    x = torch.randn(5, IN)
    for expert, W in enumerate(made.unpack()):
        assert W.shape == (OUT, IN) and torch.linalg.matrix_rank(W) == 2
        torch.testing.assert_close(made.product(made(), x, expert), x @ W.T)
    build_expert_factors(bank, recorded(**more), "bank")
    assert bank.second is made, "what is there already is left"


def test_wrong_records():
    for changes, message in [
        (recorded("third"), "expected factors of the experts of bank, got .* of 'third'"),
        (recorded("bias") | {"bias.experts": 2}, "expected factors of the experts of bank"),
        ({"second.rank": 2}, "expected factors of the experts of bank"),
        (recorded() | {"second.experts": 2}, "expected factors of the experts of bank"),
        (recorded(shared_reduce=1, shared_expand=1), "expected factors of the experts of bank"),
        (recorded(rank=5), r"module_shapes: bank.second: rank: expected 1..4, got 5"),
    ]:
        with pytest.raises(ValueError, match=message):
            build_expert_factors(Bank(), changes, "bank")
    bank = Bank()
    build_expert_factors(bank, recorded(), "bank")
    with pytest.raises(ValueError, match=r"module_shapes: expected .*2.* of bank, got .*3"):
        build_expert_factors(bank, recorded(rank=3), "bank")
    assert LowRankExperts(torch.Size((3, 4, 6)), 3, False, 0, torch.float32, 6, EXPERT_KEYS[3]).full_rank == 6
