"""One matrix with increments beside it, through PEFT's interface of a layer."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_cod.training.adapters.config import OwLoreConfig
from hf_cod.training.adapters.layer import OwLoreLinear

OUT, IN = 6, 5


def adapted(base, learnt=0):
    """In eval mode; of `learnt` ranks it has learnt what B A says."""
    layer = OwLoreLinear(base, "default", OwLoreConfig(r=2), held=(0, learnt)).eval()
    increment = layer.owlore_increment["default"]
    increment.A.normal_()
    increment.B.normal_()
    return layer, increment


@pytest.mark.parametrize("base", [nn.Linear(IN, OUT), Conv1D(OUT, IN)], ids=["linear", "conv1d"])
def test_a_new_layer_is_its_base(base):
    (layer, _), x = adapted(base), torch.randn(3, IN)
    assert torch.equal(layer(x), base(x)) and (layer.out_features, layer.in_features) == (OUT, IN)
    assert not layer.get_delta_weight("default").any()
    with pytest.raises(ValueError, match="adapter: expected one of default, got 'other'"):
        layer.get_delta_weight("other")


@pytest.mark.parametrize("base", [nn.Linear(IN, OUT), Conv1D(OUT, IN)], ids=["linear", "conv1d"])
def test_what_was_learnt_is_added_to_outputs_or_to_the_weight(base):
    (layer, increment), x = adapted(base, learnt=2), torch.randn(3, IN)
    intact, expected = base.weight.clone(), base(x) + x @ (increment.B @ increment.A).T
    torch.testing.assert_close(layer(x), expected)
    layer.merge()
    assert layer.get_delta_weight("default").shape == base.weight.shape
    torch.testing.assert_close(base(x), expected)
    torch.testing.assert_close(layer(x), expected)
    layer.unmerge()
    torch.testing.assert_close(base.weight, intact)
    torch.testing.assert_close(layer(x), expected)


def test_a_weight_that_cannot_be_written_is_not_merged():
    class Codes(nn.Module):
        in_features, out_features = IN, OUT

        def __init__(self):
            super().__init__()
            self.register_buffer("codes", torch.zeros(OUT, IN, dtype=torch.uint8))

        def forward(self, x):
            return x @ self.codes.float().T

    layer, _ = adapted(Codes())
    assert layer(torch.randn(2, IN)).shape == (2, OUT)
    with pytest.raises(ValueError, match="merge: expected a weight that can be written, got Codes"):
        layer.merge()
