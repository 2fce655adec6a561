"""Which layers can run in each other's place."""

from hf_cod import find_decoder_layers
from hf_cod.layers.exchange import why_not_exchangeable
from tests.tiny_models import build


def reasons(model, other):
    mine, theirs = find_decoder_layers(model), find_decoder_layers(other)
    return [why_not_exchangeable(mine, i, theirs, i) for i in range(len(mine))]


def test_layers_of_one_kind():
    assert reasons(build("llama"), build("llama")) == [None] * 4


def test_class_shapes_and_entries_of_the_config():
    assert "GPT2Block in the place of LlamaDecoderLayer" in reasons(build("llama"), build("gpt2"))[0]
    assert (
        "of shape [64, 32] in the place of [48, 32]" in reasons(build("llama"), build("llama", intermediate_size=64))[0]
    )
    stack = find_decoder_layers(build("gemma3"))
    told = why_not_exchangeable(stack, 0, stack, 1)
    assert told == "layer_types 'full_attention' in the place of 'sliding_attention'"
    dense = find_decoder_layers(build("deepseek_v3"))
    assert "in the place of" in why_not_exchangeable(dense, 1, dense, 2), "a dense layer and one with experts"
