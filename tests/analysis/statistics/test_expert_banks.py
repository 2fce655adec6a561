import pytest
import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from hf_cod.analysis.statistics.expert_banks import IMPLEMENTATION, observed
from hf_cod.layers.stack import find_decoder_layers
from tests.tiny_models import MIXTURES, batch_for, build


def banks_of(model):
    stack = find_decoder_layers(model)
    return {name: bank for i in range(len(stack)) for name, bank in stack.experts(i).items()}


@pytest.mark.parametrize("family", MIXTURES)
def test_the_model_computes_what_it_computed_before(family):
    model = build(family)
    batch = batch_for(model)
    seen = {}
    with torch.no_grad():
        expected = model(**batch).logits
        with observed(banks_of(model), lambda name, expert, x, tokens: seen.setdefault(name, []).append((expert, x))):
            found = model(**batch).logits
        after = model(**batch).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(after, expected) and IMPLEMENTATION not in ALL_EXPERTS_FUNCTIONS
    shapes = {name: shape for i in range(4) for name, shape in find_decoder_layers(model).input_shapes(i).items()}
    assert all(x.shape[1] == shapes[name][1] for name, rows in seen.items() for _, x in rows)
    assert {name for name, shape in shapes.items() if len(shape) == 2} == set(seen)


def test_everything_comes_back_after_an_error():
    model = build("mixtral")
    before = model.config._experts_implementation

    def fail(*arguments):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"), observed(banks_of(model), fail):
        model(**batch_for(model))
    assert model.config._experts_implementation == before and IMPLEMENTATION not in ALL_EXPERTS_FUNCTIONS


def test_a_bank_with_code_of_its_own_is_refused():
    class Bank(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.ones(2, 4, 4))

    with pytest.raises(ValueError, match="transformers' experts interface, got Bank"), observed({"x": Bank()}, print):
        pass
