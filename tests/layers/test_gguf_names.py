import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hf_cod import find_decoder_layers
from hf_cod.layers.gguf_names import gguf_names, with_same_input
from tests.tiny_models import build

# Names that the converter of llama.cpp gives, written by hand.
ATTENTION = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
MLP = {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
LLAMA = {**{f"self_attn.{k}": [v] for k, v in ATTENTION.items()}, **{f"mlp.{k}": [v] for k, v in MLP.items()}}
GPT2 = {
    "attn.c_attn": ["attn_qkv"],
    "attn.c_proj": ["attn_output"],
    "mlp.c_fc": ["ffn_up"],
    "mlp.c_proj": ["ffn_down"],
}
BANK = {"gate_up_proj": ["ffn_gate_exps", "ffn_up_exps"], "down_proj": ["ffn_down_exps"]}
ATTENTION_OF_LLAMA = {f"self_attn.{k}": [v] for k, v in ATTENTION.items()}


@pytest.mark.parametrize(
    "family, expected",
    [
        ("llama", LLAMA),
        ("mistral", LLAMA),
        ("gemma3", LLAMA),
        ("gpt2", GPT2),
        ("mixtral", {**ATTENTION_OF_LLAMA, **{f"mlp.experts.{k}": v for k, v in BANK.items()}}),
    ],
)
def test_names_of_layer_one(family, expected):
    stack = find_decoder_layers(build(family, layers=2))
    found = gguf_names(stack)
    assert found.keys() == {name for index in range(2) for name in stack.input_shapes(index)}
    for short, tensors in expected.items():
        name = f"{stack.layers_path}.1.{short}"
        assert found[name] == [(f"blk.1.{tensor}", None) for tensor in tensors]


def test_fused_matrices_of_phi3_on_the_meta_device():
    config = AutoConfig.for_model(
        "phi3", hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=1, vocab_size=99,
        pad_token_id=0,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    found = gguf_names(find_decoder_layers(model))
    tensors = {name.rpartition(".")[2]: [tensor for tensor, _ in entries] for name, entries in found.items()}
    assert tensors["qkv_proj"] == ["blk.0.attn_qkv", "blk.0.attn_q", "blk.0.attn_k", "blk.0.attn_v"]
    assert tensors["gate_up_proj"] == ["blk.0.ffn_up"] and tensors["down_proj"] == ["blk.0.ffn_down"]


def test_an_architecture_that_gguf_does_not_have():
    with pytest.raises(ValueError, match=r"^model: expected an architecture that GGUF has names for, got opt$"):
        gguf_names(find_decoder_layers(build("opt")))


def test_same_input():
    assert [*with_same_input("blk.7.attn_k")] == ["blk.7.attn_k", "blk.7.attn_q", "blk.7.attn_v", "blk.7.attn_qkv"]
    assert [*with_same_input("blk.7.ffn_down")] == ["blk.7.ffn_down"]
