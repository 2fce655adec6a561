"""Sizes of narrowed layers in the names of the family's config; `test_narrower.py` tests layers of equal sizes."""

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_cod import allocate, drop_layers, factorize, narrow
from tests.compression.export.models import llama, scores
from tests.tiny_models import batch_for, build

MLP = ["gate_proj", "up_proj", "down_proj"]


def narrowed(model, values, **how):
    plan = allocate(scores(model, values), "parameter_share", 0.75, 0.2)
    narrow(model, plan, method="magnitude", compensation="none", **how)
    return model


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def stock_layers(folder, overrides):
    """A stock model whose layers are built by transformers, each from the config with its overrides."""
    base = {name: value for name, value in config_of(folder).items() if name not in ("per_layer_config", "model_type")}
    model = LlamaForCausalLM(LlamaConfig.from_dict(copy.deepcopy(base)))
    kind = type(model.model.layers[0])
    for index in range(len(model.model.layers)):
        own = LlamaConfig.from_dict({**base, **overrides.get(str(index), {})})
        own._attn_implementation = model.config._attn_implementation  # which the model sets after building
        model.model.layers[index] = kind(own, index)
    return model.eval()


def test_stock_layers_of_these_sizes_compute_the_same(tmp_path):
    model = narrowed(llama(4, head_dim=16), [4.0, 1.0, 3.0, 2.0])
    model.save_pretrained(tmp_path)
    overrides = config_of(tmp_path)["per_layer_config"]
    assert len({json.dumps(each) for each in overrides.values()}) > 1
    assert any("num_key_value_heads" in each for each in overrides.values())
    stock = stock_layers(tmp_path, overrides)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    stock.load_state_dict(loaded.state_dict())  # equal names and shapes
    with torch.no_grad():
        expected = model(**batch_for(model)).logits
        assert torch.equal(loaded(**batch_for(model)).logits, expected)
        assert torch.equal(stock(**batch_for(model)).logits, expected)
    loaded.save_pretrained(tmp_path / "again")
    assert config_of(tmp_path / "again") == config_of(tmp_path)
    assert AutoModelForCausalLM.from_config(loaded.config).config.layer_overrides == overrides


def test_transformers_reads_the_sizes_of_mlps(tmp_path):
    """Of 5.24 Llama's config itself reads the number of heads, and refuses one that differs between layers."""
    model = narrowed(llama(4), [4.0, 1.0, 3.0, 2.0], include=MLP)
    model.save_pretrained(tmp_path)
    read = LlamaConfig.from_pretrained(tmp_path).per_layer_config
    assert [own.intermediate_size for own in read] == [layer.mlp.up_proj.out_features for layer in model.model.layers]


def test_they_follow_their_layers_and_end_with_other_shapes(tmp_path):
    model = narrowed(llama(4), [4.0, 1.0, 3.0, 2.0], include=MLP)
    before = model.config.layer_overrides
    drop_layers(model, [1])
    kept = [before.get(str(old)) for old in (0, 2, 3)]
    assert [model.config.layer_overrides.get(str(index)) for index in range(3)] == kept
    sizes = [layer.mlp.up_proj.out_features for layer in model.model.layers]
    assert [each["intermediate_size"] if each else 128 for each in kept] == sizes
    factorize(model, 0.5, method="plain")
    model.save_pretrained(tmp_path)
    assert "per_layer_config" not in config_of(tmp_path)


@pytest.mark.parametrize(("family", "how"), [("llama", {"compensation": "bias"}), ("gpt2", {})])
def test_what_a_config_cannot_say_is_not_written(family, how, tmp_path):
    """A bias in one matrix, and half of the heads of a family that derives their size."""
    model = build(family, 4)
    plan = allocate(scores(model, [4.0, 1.0, 3.0, 2.0]), "parameter_share", 0.8, 0.15)
    narrow(model, plan, method="magnitude", batches=[batch_for(model)], **how)
    model.save_pretrained(tmp_path)
    assert config_of(tmp_path)["module_shapes"]
    assert not config_of(tmp_path).keys() & {"per_layer_config", "layer_overrides"}
