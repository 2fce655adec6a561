"""Lists of a config with as many entries as there are layers: by layer, all indices, or something else."""

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForVideoClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from examples.tiny_architectures import build as build_type
from examples.tiny_architectures import tiny_config
from hf_cod import drop, find_decoder_layers, skip
from hf_cod.layers.removal.list_readings import Meanings
from hf_cod.layers.removal.repeat import repeat
from tests.layers.removal.test_drop import dropped, output, snapshot
from tests.tiny_models import build

SIZES = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "pad_token_id": 0}
IDS = torch.arange(3, 11)[None]


def made(kind, auto=AutoModelForCausalLM, **values):
    torch.manual_seed(0)
    return auto.from_config(CONFIG_MAPPING[kind](**values)).eval()


def passing_over(model, layers):
    """The output if these layers return the hidden states that they get."""

    def same(module, args, kwargs, output):
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    stack = find_decoder_layers(model)
    handles = [stack[i].register_forward_hook(same, with_kwargs=True) for i in layers]
    expected = output(model, {"input_ids": IDS})
    for handle in handles:
        handle.remove()
    return expected


def molmo(scaled):
    rope = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4}
    sizes = {"num_hidden_layers": 4, "num_key_value_heads": 2, "head_dim": 8, "additional_vocab_size": 4}
    return made("molmo2_text", AutoModel, **SIZES, **sizes, rope_scaling_layers=scaled, rope_parameters=rope)


def mistral(sources):
    values = {"num_key_value_heads": 4, "head_dim": 4, "no_rope_layers": [1] * 4, "kv_source_layers": sources}
    return made("mistral_large4_text", AutoModel, **{**tiny_config("mistral_large4_text").to_dict(), **values})


@pytest.mark.parametrize(
    ("build_it", "given", "removed", "field", "left"),
    [
        (molmo, None, [0], "rope_scaling_layers", [0, 1, 2]),
        (molmo, None, [1, 3], "rope_scaling_layers", [0, 1]),
        (molmo, [0, 2], [0], "rope_scaling_layers", [1]),
        (mistral, None, [1], "kv_source_layers", [0, 1, 2]),
        (mistral, [0, 1, 1, 1], [0], "kv_source_layers", [0, 0, 0]),
    ],
)
def test_indices_of_layers(build_it, given, removed, field, left, tmp_path):
    model = build_it(given)
    expected = passing_over(model, removed)
    dropped(model, removed, tmp_path)
    torch.testing.assert_close(output(model, {"input_ids": IDS}), expected, atol=1e-6, rtol=1e-6)
    assert getattr(model.config, field) == left


def test_indices_of_repeated_layers():
    model = molmo([0, 2])
    repeat(model, 1, 3)
    assert model.config.rope_scaling_layers == [0, 2, 4]
    assert model.rope_types == ["scaled", "unscaled", "scaled", "unscaled", "scaled", "unscaled"]


def test_a_layer_that_another_one_names_is_kept():
    model = mistral([0, 0, 2, 2])
    before = snapshot(model)
    for remove in (lambda: drop(model, 0), skip(model, 0).__enter__):
        with pytest.raises(ValueError, match=r"^layers: expected to keep layer 0, which kv_source_layers names"):
            remove()
        assert snapshot(model) == before
    drop(model, [0, 1])
    assert model.config.kv_source_layers == [0, 0]


MAMBA = {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "bos_token_id": 0, "eos_token_id": 0}
RELATIVE = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
BY_CHANCE = {
    "mamba2": lambda: made("mamba2", vocab_size=99, hidden_size=32, num_hidden_layers=2, pad_token_id=0, **MAMBA),
    "deberta": lambda: made("deberta", AutoModelForMaskedLM, **SIZES, num_hidden_layers=2, **RELATIVE),
}


@pytest.mark.parametrize(("name", "field"), [("mamba2", "time_step_limit"), ("deberta", "pos_att_type")])
def test_as_many_entries_by_chance(name, field, tmp_path):
    model = BY_CHANCE[name]()
    expected, before = passing_over(model, [0]), [*getattr(model.config, field)]
    dropped(model, 0, tmp_path)
    torch.testing.assert_close(output(model, {"input_ids": IDS}), expected, atol=1e-6, rtol=1e-6)
    assert [*getattr(model.config, field)] == before


def test_sizes_of_tubes_in_a_model_of_three_layers(tmp_path):
    sizes = {name: SIZES[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads")}
    video = {"image_size": 16, "tubelet_size": [2, 8, 8], "num_frames": 4, "num_labels": 3, "num_hidden_layers": 3}
    model = made("vivit", AutoModelForVideoClassification, **sizes, **video)
    drop(model, 1)
    assert model.config.tubelet_size == [2, 8, 8]
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    batch = {"pixel_values": torch.rand(1, 4, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
    torch.testing.assert_close(output(again, batch), output(model, batch), atol=1e-6, rtol=1e-6)


def test_lists_that_the_model_does_not_read_stay():
    languages = {"langs": ["en", "de"], "src_vocab_size": 99, "tgt_vocab_size": 99, "d_model": 32}
    depth = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64}
    model = made("fsmt", AutoModelForSeq2SeqLM, **languages, **depth, **heads)
    drop(model, 1, "encoder")
    assert model.config.langs == ["en", "de"]
    for mine in ([7, 8, 9, 10], [0, 1, 2, 3]):
        model = build("llama", mine=mine)
        drop(model, 1)
        assert model.config.mine == mine


class Ambiguous(LlamaForCausalLM):
    """Reads a list, of which nothing shows whether it names layers or has an entry for each."""

    def __init__(self, config):
        super().__init__(config)
        self.total = len(config.chosen) - config.num_hidden_layers


def test_a_list_with_two_meanings_is_refused():
    model = Ambiguous(LlamaConfig(**SIZES, num_hidden_layers=4, chosen=[0, 1, 2, 3])).eval()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"^layers: expected lists of the config with one meaning, got chosen = "):
        drop(model, 0)
    assert snapshot(model) == before


class Outside(LlamaForCausalLM):
    """Keeps a number by layer that its config says otherwise after a removal."""

    def __init__(self, config):
        super().__init__(config)
        self.shares = {"first": 1 / config.num_hidden_layers}


def test_settings_outside_of_the_layers_that_a_reload_would_change_are_refused():
    model = Outside(LlamaConfig(**SIZES, num_hidden_layers=4)).eval()
    with pytest.raises(ValueError, match=r"^layers: expected settings outside of the layers .* got shares = \{'first'"):
        drop(model, 0)


def test_the_class_of_a_config_tells():
    meanings = Meanings(molmo(None).config, ["num_hidden_layers"], 4, ())
    assert meanings.reading("rope_scaling_layers", [0, 1, 2, 3], [1, 3]).values == [[0, 1]]
    assert meanings.reading("nobody_knows", [5, 6, 7, 8], [1, 3]).values == [[6, 8], [5, 6, 7, 8]]
    assert meanings.reading("nobody_knows", [1, 3], [1, 3]) is None


def test_a_list_of_another_length_than_that_of_the_class_is_by_layer():
    """Reformer's kinds of attention, of which the class has six whatever the number of layers is."""
    model = build_type("reformer")
    assert model.config.attn_layers == ["local", "lsh"] * 2
    repeat(model, 1, 2)
    assert model.config.attn_layers == ["local", "lsh", "lsh", "local", "lsh"]
