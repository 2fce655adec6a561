import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import CONFIG_MAPPING, AutoModel

from examples.tiny_architectures import build as build_type
from hf_cod import find_decoder_layers, plan_bits, score_layers
from tests.tiny_models import CAUSAL, FAMILIES, build

PATHS = {"gpt2": "transformer.h", "opt": "model.decoder.layers", "bert": "bert.encoder.layer"}


@pytest.mark.parametrize("family", FAMILIES)
def test_finds_the_stack_and_what_is_inside(family):
    model = build(family)
    stack = find_decoder_layers(model)
    assert len(stack) == 4
    assert stack.layers_path == PATHS.get(family, stack.layers_path)
    named = dict(model.named_parameters())
    owned = {name for name in named if stack.index_of(name) is not None}
    assert {id(named[name]) for name in owned} == {id(p) for layer in stack for p in layer.parameters()}
    for index in range(4):
        assert stack.linears(index), "every layer has matrices"
        if family != "olmo2":  # whose norms count as well, but stand on the outputs
            assert stack.norms(index)
        for name, module in {**stack.linears(index), **stack.norms(index)}.items():
            assert stack.index_of(name) == index
            assert model.get_submodule(name) is module
    assert stack.embeddings is model.get_input_embeddings()
    assert (stack.head is not None) == (family in CAUSAL or family in ("bert", "mpnet"))
    assert list(stack.task_heads) == (["classifier"] if family == "vit" else [])


def test_all_matrices_of_a_layer_are_found():
    llama = find_decoder_layers(build("llama"))
    assert [name.split(".")[-1] for name in llama.linears(2)] == [
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    ]  # fmt: skip
    assert len(llama.norms(0)) == 2
    gpt2 = find_decoder_layers(build("gpt2"))
    assert list(gpt2.linears(1)) == [
        f"transformer.h.1.{m}" for m in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    assert type(gpt2.linears(1)["transformer.h.1.mlp.c_fc"]).__name__ == "Conv1D"


def test_experts_are_found_as_banks():
    stack = find_decoder_layers(build("mixtral"))
    assert list(stack.experts(0)) == ["model.layers.0.mlp.experts"]
    assert find_decoder_layers(build("llama")).experts(0) == {}


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "dinov2", "vit"])
def test_final_norm(family):
    norm = find_decoder_layers(build(family)).final_norm
    assert isinstance(norm, nn.Module) and "orm" in type(norm).__name__


def test_a_norm_of_narrower_states_is_not_the_final_norm():
    model = build_type("gemma3n_text")
    assert find_decoder_layers(model).final_norm is model.model.norm


def test_post_ln_has_no_final_norm():
    assert find_decoder_layers(build("bert")).final_norm is None


@pytest.mark.parametrize("wrap", ["peft", "compile", "compiled_layer", "peft_compile"])
def test_wrapped_models_give_the_same_stack(wrap):
    model = build("llama")
    plain = find_decoder_layers(model)
    names, layers = list(plain.linears(1)), list(plain)
    wrapped = model
    if "peft" in wrap:
        wrapped = get_peft_model(wrapped, LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    if "compile" in wrap and wrap != "compiled_layer":
        wrapped = torch.compile(wrapped)
    if wrap == "compiled_layer":
        model.model.layers[1] = torch.compile(model.model.layers[1])
        layers[1] = model.model.layers[1]
    stack = find_decoder_layers(wrapped)
    assert list(stack) == layers
    assert list(stack.linears(1)) == names, "names are those of the bare model, adapters' own factors do not count"
    counted = [name for name, _ in wrapped.named_parameters() if stack.index_of(name) == 1]
    assert len(counted) == len(list(layers[1].named_parameters()))


def test_distributed_wrapper(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(build("llama"))
        stack = find_decoder_layers(wrapped)
        assert len(stack) == 4 and stack.index_of("module.model.layers.3.mlp.up_proj.weight") == 3
    finally:
        torch.distributed.destroy_process_group()


def test_no_stack_is_told_with_what_there_is():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.towers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])

    with pytest.raises(ValueError, match=r"module lists: towers \(2 x Linear\)"):
        find_decoder_layers(Odd())
    assert len(find_decoder_layers(Odd(), layers_path="towers")) == 2
    with pytest.raises(ValueError, match=r"^stack: expected none for Odd, .* name of a module list, got 'tower'"):
        find_decoder_layers(Odd(), layers_path="tower")
    with pytest.raises(ValueError, match=r"^layers_path: expected the name of a module list, got 'model\.tower'"):
        find_decoder_layers(Odd(), layers_path="model.tower")
    with pytest.raises(ValueError, match="the model has no module lists"):
        find_decoder_layers(nn.Linear(2, 2))


def test_one_layer_model():
    assert len(find_decoder_layers(build("llama", layers=1))) == 1


def test_names_outside_the_stack_have_no_layer():
    stack = find_decoder_layers(build("llama"))
    assert stack.index_of("model.embed_tokens.weight") is None
    assert stack.index_of("lm_head.weight") is None


def test_data_parallel_is_unwrapped():
    assert len(find_decoder_layers(nn.DataParallel(build("llama")))) == 4


def test_prompt_learning_is_refused():
    model = get_peft_model(build("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="got prompt learning"):
        find_decoder_layers(model)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gpt_oss", "bert"])
def test_matrices_stand_as_out_by_in(family):
    stack = find_decoder_layers(build(family))
    for index in range(len(stack)):
        found = dict(stack.matrices(index))
        assert {name: (*W.shape[:-2], W.shape[-1]) for name, W in found.items()} == stack.input_shapes(index)
        assert stack.count_weights(index) == sum(W.numel() for W in found.values())


def test_kernels_of_convolutions_are_no_experts():
    model = build("llama", layers=2)
    model.model.layers[0].mixer = nn.Conv1d(4, 4, 3)
    stack = find_decoder_layers(model)
    assert stack.experts(0) == {} and len(stack.input_shapes(0)) == len(stack.input_shapes(1))


def test_what_a_model_lacks_is_said_of_the_right_field():
    sizes = {"emb_dim": 32, "n_layers": 3, "n_heads": 4, "n_words": 99}
    with pytest.raises(ValueError, match=r"expected one module list of 3 layers .* got 4 lists of that length"):
        find_decoder_layers(AutoModel.from_config(CONFIG_MAPPING["flaubert"](**sizes)))
    with pytest.raises(ValueError, match=r"^stack: expected none for LlamaForCausalLM, .* got 'encoder'"):
        find_decoder_layers(build("llama"), stack="encoder")


def test_layers_of_convolutions_have_no_matrices():
    sizes = {"vocab_size": 99, "hidden_size": 32, "embedding_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
    model = AutoModel.from_config(CONFIG_MAPPING["squeezebert"](**sizes, num_attention_heads=4)).eval()
    with pytest.raises(ValueError, match=r"^model: expected matrices in the layers of SqueezeBertModel .* got none"):
        score_layers(model, method="owl", batches=[{"input_ids": torch.ones(2, 9, dtype=torch.long)}])
    with pytest.raises(ValueError, match=r"quantized, got none; the layers have no Linear$"):
        plan_bits(model, 4.0)
