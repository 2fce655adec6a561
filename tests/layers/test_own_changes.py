"""RWKV rescales two matrices of each block in eval mode: what changes it leaves the weights as a file holds them."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from hf_cod import OwlBnbConfig, diagnose, factorize, find_decoder_layers, narrow, prune, quantize
from hf_cod.compression.quantization.linear import Linear3bit
from hf_cod.layers.own_changes import undoing_own_changes, undone_at_the_end
from tests.layers.test_direct_use import family
from tests.tiny_models import outputs

BATCH = {"input_ids": torch.arange(3, 27).reshape(2, 12)}
RESCALED = ("attention.output", "feed_forward.value")


def rwkv(evaluated):
    model = family("rwkv")
    if evaluated:
        outputs(model)
    return model


@pytest.mark.parametrize("evaluated", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        lambda model: prune(model, 0.5, "wanda", batches=[BATCH]),
        lambda model: prune(model, 0.5, "magnitude"),
        lambda model: quantize(model, OwlBnbConfig(bits=4), batches=[BATCH]),
        lambda model: factorize(model, 0.8, "whitened", batches=[BATCH]),
        lambda model: narrow(model, 0.8, batches=[BATCH]),
    ],
    ids=["wanda", "magnitude", "quantize", "whitened", "narrow"],
)
def test_saved_and_loaded_again(change, evaluated, tmp_path):
    """Also after an evaluation, which has rescaled the weights already."""
    model = rwkv(evaluated)
    change(model)
    assert not model.training and not model.rwkv.layers_are_rescaled
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    for name, module in find_decoder_layers(loaded).model.named_modules():
        if name.endswith(RESCALED):
            assert type(module) is nn.Linear, name
    assert torch.equal(outputs(model, BATCH), outputs(loaded, BATCH))


@pytest.mark.parametrize("evaluated", [False, True])
def test_without_a_change_each_bit_is_that_of_the_file(evaluated):
    model, intact = rwkv(evaluated), family("rwkv").state_dict()
    prune(model, 0.0, "wanda", batches=[BATCH])
    assert all(torch.equal(tensor, intact[name]) for name, tensor in model.state_dict().items())
    quantized = rwkv(evaluated)
    report = quantize(quantized, OwlBnbConfig(bits=3))
    assert any(note.startswith("the model changes 8 of its weights in eval mode") for note in report.notes)
    assert sum(isinstance(module, Linear3bit) for module in quantized.modules()) == 4 * 5


def test_zeros_are_those_of_a_model_that_does_not_rescale():
    model, plain = rwkv(False), rwkv(False)
    plain.config.rescale_every = 0
    for each in (model, plain):
        prune(each, 0.5, "wanda", batches=[BATCH])
    stack = find_decoder_layers(plain)
    for index in range(len(stack)):
        for name, module in stack.linears(index).items():
            assert float(((module.weight == 0) != (model.get_parameter(f"{name}.weight") == 0)).double().mean()) < 0.01


def test_diagnosis_leaves_out_what_removes_layers():
    report = diagnose(rwkv(False), batches=[BATCH], show_progress=False)
    assert report.layers["angular_distance"] and "layer_drop" not in report.layers
    assert any(note.startswith("layer_drop was left out: expected weights that stay the same") for note in report.notes)


class Halving(nn.Module):
    """Halves its weight in each forward pass, in any mode."""

    def __init__(self):
        super().__init__()
        self.embedding, self.second = nn.Embedding(99, 4), nn.Linear(4, 4)

    def forward(self, input_ids):
        with torch.no_grad():
            self.second.weight.mul_(0.5)
        return self.second(self.embedding(input_ids))


def test_what_a_model_does_not_undo_is_refused_and_put_back():
    model = Halving().eval()
    before = copy.deepcopy(model.state_dict())
    asked = undoing_own_changes(lambda model: undone_at_the_end(model, ["second.weight"]))
    assert not asked(model) and not undone_at_the_end(model, ["second.weight"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
