from hf_cod import find_decoder_layers
from hf_cod.layers.parts import parts_of
from tests.tiny_models import build


def last(name):
    return name.rpartition(".")[2]


def test_blocks_are_attention_and_mlp():
    stack = find_decoder_layers(build("llama"))
    blocks = [{last(name) for name in part.names} for part in parts_of(stack, "block") if part.layer == 0]
    assert blocks == [{"q_proj", "k_proj", "v_proj", "o_proj"}, {"gate_proj", "up_proj", "down_proj"}]
    assert [len(parts_of(stack, of)) for of in ("layer", "module")] == [len(stack), 7 * len(stack)]
    bare = parts_of(find_decoder_layers(build("opt")), "block")[0]
    assert {last(name) for name in bare.names} == {"q_proj", "k_proj", "v_proj", "out_proj"}
