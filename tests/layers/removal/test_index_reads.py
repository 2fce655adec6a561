"""Layers that compute with their own index: one that moves to another index would compute something else."""

import pytest
import torch
from transformers import ImageGPTConfig, ImageGPTForCausalImageModeling
from transformers.models.llama.modeling_llama import LlamaAttention

from hf_cod import drop, find_decoder_layers, skip
from hf_cod.layers.removal.index_reads import recorded_reads
from hf_cod.layers.removal.repeat import check_repeat
from tests.layers.removal.test_drop import output, snapshot
from tests.references import without_layer
from tests.tiny_models import batch_for, build

REASON = r"^layers: expected layers of .* that compute the same at their new index, got layer \d, which reads its index"


class ByIndex(LlamaAttention):
    def factor(self):
        return self.layer_idx + 1

    def forward(self, *args, **kwargs):
        output, weights = super().forward(*args, **kwargs)
        return output * self.factor(), weights


class ByList(ByIndex):
    def factor(self):
        return 3 if self.layer_idx in self.config.special_layers else 1


class ByNumber(ByIndex):
    def factor(self):
        return 1 / self.config.num_hidden_layers


class ByLayer(ByIndex):
    """Reads its own entry of a list by layer, which moves with it."""

    def factor(self):
        return self.config.factors[self.layer_idx]


def llama(attention):
    model = build("llama", special_layers=[1, 3], factors=[1.0, 2.0, 3.0, 4.0])
    for layer in model.model.layers:
        layer.self_attn.__class__ = attention
    return model


def image_gpt():
    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}
    return ImageGPTForCausalImageModeling(ImageGPTConfig(**sizes, scale_attn_by_inverse_layer_idx=True)).eval()


CASES = {"image_gpt": image_gpt, **{c.__name__: lambda c=c: llama(c) for c in (ByIndex, ByList, ByNumber)}}


@pytest.mark.parametrize("name", CASES)
def test_a_layer_that_would_compute_something_else_is_refused(name):
    model = CASES[name]()
    before, kinds = snapshot(model), [type(m) for m in model.modules()]
    for change in (
        lambda: drop(model, 0),
        skip(model, [0, 2]).__enter__,
        lambda: check_repeat(model, 0, 1),
        *([lambda: drop(model, 3)] if name == "ByNumber" else []),
    ):
        with pytest.raises(ValueError, match=REASON) as caught:
            change()
        assert "\n" not in str(caught.value)
        assert snapshot(model) == before and [type(m) for m in model.modules()] == kinds
    if name != "ByNumber":
        expected = output(without_layer(model, 3), batch_for(model))
        assert drop(model, 3) == [0, 1, 2]
        torch.testing.assert_close(output(model, batch_for(model)), expected, atol=1e-6, rtol=1e-6)


def test_the_way_out_follows_from_what_a_layer_reads():
    with pytest.raises(ValueError, match=r"layer 1 of 3 layers; at most the last layers can be removed$"):
        drop(llama(ByIndex), 1)
    with pytest.raises(ValueError, match=r"layer 0 of 3 layers; none can be removed$"):
        drop(llama(ByNumber), 1)


@pytest.mark.parametrize("layer", range(4))
def test_a_layer_that_reads_its_entry_of_a_list_takes_it_along(layer):
    model = llama(ByLayer)
    expected = output(without_layer(model, layer), batch_for(model))
    drop(model, layer)
    torch.testing.assert_close(output(model, batch_for(model)), expected, atol=1e-6, rtol=1e-6)
    assert model.config.factors == [float(i + 1) for i in range(4) if i != layer]


def test_one_layer_of_each_kind_runs_alone_where_none_reads_its_index(monkeypatch):
    """The cost of a check."""
    model = build("llama")
    with skip(model, 0):  # whether the model writes to its weights is found once
        pass
    runs = []
    for index, layer in enumerate(find_decoder_layers(model)):
        monkeypatch.setattr(layer, "forward", lambda *a, i=index, f=layer.forward, **k: runs.append(i) or f(*a, **k))
    with skip(model, 0):
        assert runs == [0, 0]  # once for what a layer returns beside its hidden state


def test_a_compiled_layer_is_not_compiled_by_a_check():
    model = llama(ByIndex)
    for index in range(4):
        model.model.layers[index] = torch.compile(model.model.layers[index], backend=_fails)
    with pytest.raises(ValueError, match=REASON):
        drop(model, 1)


def _fails(*_):
    raise AssertionError("compiled")


def test_reads_are_named():
    layer, read = llama(ByList).model.layers[2], set()
    kinds = [type(module) for module in layer.modules()]
    with recorded_reads(layer, read):
        assert layer.self_attn.factor() == 1
    assert read == {"layer_idx", "special_layers"} and [type(module) for module in layer.modules()] == kinds
