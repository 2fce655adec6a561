"""The model of the tests of exports: rows of whole groups, in layers that differ."""

from hf_cod import LayerScores, find_decoder_layers
from tests.tiny_models import batch_for, build

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}


def llama(layers=3, **more):
    return build("llama", layers, **{**SIZES, **more})


def scores(model, values):
    stack = find_decoder_layers(model)
    return LayerScores("llama", "given", values, [stack.count_weights(i) for i in range(len(stack))])


def batches(model):
    return [batch_for(model), {key: tensor[:2] for key, tensor in batch_for(model).items()}]
