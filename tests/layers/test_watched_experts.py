"""Banks of experts that work with packed matrices, and those that do something else with their parameters."""

import pytest
import torch

from hf_cod import find_decoder_layers
from hf_cod.layers.direct_use import direct_use
from tests.tiny_models import MIXTURE_TYPES, build_mixture


@pytest.mark.parametrize("kind", [*MIXTURE_TYPES, "inkling_text", "zaya"])
def test_banks_of_all_kinds_can_be_packed(kind):
    model = build_mixture(kind)
    before = {name: p for name, p in model.named_parameters()}
    use = direct_use(model)
    assert not use.unpackable and use.failure is None
    assert all(p is before[name] for name, p in model.named_parameters())
    assert find_decoder_layers(model).expert_matrices(3)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_bank_that_uses_its_parameters_otherwise(device):
    model = build_mixture("jetmoe")
    bank = model.model.layers[1].mlp.input_linear
    bank.forward = lambda inputs, sizes: inputs @ bank.weight.sum(0).T
    use = direct_use(model.to(device))
    assert [*use.unpackable] == ["model.layers.1.mlp.input_linear.weight"] and use.failure is None
    reason = use.unpackable["model.layers.1.mlp.input_linear.weight"]
    assert "its experts run by more than products with one matrix: " in reason and "sum" in reason
    assert isinstance(bank.weight, torch.nn.Parameter) and bank.weight.device.type == device


def test_errors_of_the_model_itself_are_no_reasons():
    model = build_mixture("jetmoe")
    model.model.layers[1].mlp.input_linear.forward = lambda *_: 1 / 0
    use = direct_use(model)
    assert not use.unpackable and "ZeroDivisionError" in use.failure
