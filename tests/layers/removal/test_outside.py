import pytest
import torch
from transformers import AutoModelForCausalLM

from examples.tiny_architectures import Case, build
from hf_cod import drop, find_decoder_layers, skip
from hf_cod.layers.removal.outside import build_outside, changed_settings

NUMBER = ("model", "first_kv_shared_layer_idx")


def test_the_config_says_what_depends_on_the_number_of_layers():
    model = build("gemma4_text")
    before, state = build_outside(find_decoder_layers(model)), torch.get_rng_state()
    with skip(model, [0, 1]):
        after = build_outside(find_decoder_layers(model))
        assert model.model.first_kv_shared_layer_idx == 2
    assert torch.equal(torch.get_rng_state(), state), "building draws no random numbers"
    tables = {name for name, channels in before.channels.items() if after.channels[name] != channels}
    assert tables == {"model.embed_tokens_per_layer", "model.per_layer_model_projection"}
    assert {after.channels[name] for name in tables} == {2 * 8}
    assert changed_settings(model, before, after, 4, [2, 3], tables) == {NUMBER: 2}
    assert build_outside(find_decoder_layers(model)) == before


def test_sizes_that_a_model_computes_with_tensors_are_left_out():
    model = build("vision-language/inkling_mm_model")
    stack = find_decoder_layers(model, "text")
    assert all(type(channels) is int for channels in build_outside(stack).channels.values())


def test_a_number_that_the_model_itself_has_changed_is_left_alone():
    model = build("gemma4_text")
    model.model.first_kv_shared_layer_idx = 9
    drop(model, 1)
    assert model.model.first_kv_shared_layer_idx == 9


@pytest.mark.parametrize("kind", ["beam", "gemma3_text"])
def test_kinds_of_layers_that_are_gone_are_gone_outside_of_them_too(kind, tmp_path):
    """Rotary positions for each kind of layers, in a list or in a dictionary and further attributes."""
    config = Case(kind).config()
    config.layer_types = ["sliding_attention"] * 3 + ["full_attention"]
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = {"input_ids": torch.arange(3, 11)[None]}
    with torch.no_grad(), skip(model, 3):
        expected = model(**ids).logits
    drop(model, 3)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        for found in (model, type(model).from_pretrained(tmp_path).eval()):
            assert torch.equal(found(**ids).logits, expected)
