import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

import hf_cod
from hf_cod.models import FAMILIES, CodLlamaForCausalLM, fold_lns, register

from .tiny import BY_TYPE, CASES, LLAMA_CASES, inputs, tiny_config, tiny_model, tokens

TEXT_AUTOS = (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoModelForQuestionAnswering,
)
HEADS = [
    pytest.param(name, auto, marks=[] if name == "cod_llama" or auto is AutoModelForCausalLM else pytest.mark.families)
    for name in BY_TYPE
    if name != "cod_vit"
    for auto in TEXT_AUTOS
]
HEADS += [("cod_vit", AutoModel), ("cod_vit", AutoModelForImageClassification)]


def first(output) -> torch.Tensor:
    return next(value for value in output.to_tuple() if torch.is_tensor(value))


@pytest.mark.parametrize(("model_type", "placement"), CASES)
def test_saved_and_loaded_again(model_type, placement, tmp_path):
    model = tiny_model(model_type, placement)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config.norm_placement == placement
    assert torch.equal(loaded(**inputs(model_type)).logits, model(**inputs(model_type)).logits)
    if model_type != "cod_vit":
        new = {"max_new_tokens": 4, "do_sample": False}
        assert torch.equal(loaded.generate(tokens(), **new), model.generate(tokens(), **new))


@pytest.mark.parametrize(("model_type", "auto"), HEADS, ids=lambda value: getattr(value, "__name__", value))
def test_every_head_by_its_auto_class(model_type, auto, tmp_path):
    model = tiny_model(model_type, "sandwich", auto)
    model.save_pretrained(tmp_path)
    loaded = auto.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert torch.equal(first(loaded(**inputs(model_type))), first(model(**inputs(model_type))))
    assert getattr(hf_cod.models, type(model).__name__) is type(model)


@pytest.mark.parametrize("auto", TEXT_AUTOS[2:], ids=lambda auto: auto.__name__)
def test_heads_take_the_backbone_of_a_language_model_and_learn(auto, tmp_path):
    model = tiny_model("cod_llama", "mix")
    model.save_pretrained(tmp_path)
    head = auto.from_pretrained(tmp_path, num_labels=3)
    backbone, expected = head.model.state_dict(), model.model.state_dict()
    assert all(torch.equal(backbone[name], expected[name]) for name in expected)
    labels = {
        AutoModelForSequenceClassification: {"labels": torch.tensor([0, 2])},
        AutoModelForTokenClassification: {"labels": tokens() % 3},
        AutoModelForQuestionAnswering: {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 3])},
    }
    head(tokens(), **labels[auto]).loss.backward()
    assert all(weight.grad is not None for weight in head.parameters())


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_other_inference_engines_can_take_the_attention_over(family):
    assert all(model.is_backend_compatible() for model in family.models.values())


def test_registering_again_changes_nothing():
    register()
    register()
    assert AutoConfig.for_model("cod_llama").model_type == "cod_llama"


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_tensor_parallel_plan_is_the_familys(family):
    stock = family.stock_config.base_model_tp_plan
    assert family.config.base_model_tp_plan == stock
    if stock is not None:
        model = tiny_model(family.model_type, "sandwich")
        assert set(model.tp_plan) >= {f"model.{name}" for name in stock}


@pytest.mark.parametrize(("model_type", "placement"), LLAMA_CASES)
def test_tied_embeddings(model_type, placement, tmp_path):
    model = tiny_model(model_type, placement, tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize(("model_type", "placement"), LLAMA_CASES)
def test_bfloat16_keeps_the_function(model_type, placement, tmp_path):
    model = tiny_model(model_type, placement)
    model.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}
    expected = model(tokens()).logits
    assert (half(tokens()).logits.float() - expected).norm() <= 0.03 * expected.norm()
    assert [vars(layer.placement) for layer in half.model.layers] == [vars(lay.placement) for lay in model.model.layers]


@pytest.mark.parametrize(("model_type", "placement"), LLAMA_CASES)
def test_meta_initialisation_keeps_the_scale(model_type, placement):
    model = tiny_model(model_type, placement)
    with torch.device("meta"):
        empty = CodLlamaForCausalLM(tiny_config(model_type, placement))
    empty.to_empty(device="cpu")
    missing = empty.load_state_dict(model.state_dict())
    assert not missing.missing_keys and not missing.unexpected_keys
    # The rotary frequencies are buffers that no checkpoint holds; transformers computes them anew in from_pretrained.
    empty.model.rotary_emb.inv_freq.copy_(model.model.rotary_emb.inv_freq)
    assert torch.equal(empty.eval()(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize("placement", ["lns", "mix", "deepnorm"])
@pytest.mark.parametrize("options", [{"device_map": "auto"}, {"device_map": "cpu", "low_cpu_mem_usage": True}], ids=str)
def test_device_map_and_low_memory_loading(placement, options, tmp_path):
    model = tiny_model("cod_llama", placement)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


def test_layers_are_kept_whole_by_a_device_map(tmp_path):
    from accelerate import infer_auto_device_map

    model = tiny_model("cod_llama", "sandwich")
    layer = sum(weight.nbytes for weight in model.model.layers[0].parameters())
    budget = {0: model.model.embed_tokens.weight.nbytes + 2 * layer + layer // 2, "cpu": 10**9}
    devices = infer_auto_device_map(model, budget, no_split_module_classes=model._no_split_modules)
    assert not [name for name in devices if name.count(".") > 2], devices


def test_offloaded_to_disk(tmp_path):
    model = tiny_model("cod_llama", "lns")
    model.save_pretrained(tmp_path / "model")
    devices = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    devices |= {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(4)}
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=devices, offload_folder=tmp_path / "disk"
    )
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize("placement", ["lns", "mix", "deepnorm"])
@pytest.mark.parametrize("kept", [(0, 2, 3), (1, 3), (0, 1, 1, 2, 2, 3)], ids=str)
def test_a_stack_that_lost_or_doubled_layers_is_saved_with_its_function(placement, kept, tmp_path):
    model = tiny_model("cod_llama", placement)
    model.model.layers = nn.ModuleList([copy.deepcopy(model.model.layers[i]) for i in kept])
    model.config.num_hidden_layers = len(kept)
    expected = model(tokens(), use_cache=False).logits
    model.save_pretrained(tmp_path / "once")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "once")
    assert loaded.config.layer_depths == list(kept)
    assert loaded.config.original_num_hidden_layers == 4
    assert torch.equal(loaded(tokens()).logits, expected)
    loaded.save_pretrained(tmp_path / "twice")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "twice")
    assert torch.equal(again(tokens()).logits, expected)


def test_an_untouched_stack_records_no_depths(tmp_path):
    model = tiny_model("cod_llama", "lns")
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["layer_depths"] is None and written["original_num_hidden_layers"] is None
    assert written["norm_placement"] == "lns" and written["cod_code_version"] == 1


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_a_stock_checkpoint_is_not_taken_for_one_of_ours(family, tmp_path):
    default = family.config().norm_placement
    model = tiny_model(family.model_type, "reordered" if family.model_type == "cod_olmo2" else "pre")
    stock = fold_lns(model, tmp_path / "stock")
    expected = stock(**inputs(family.model_type)).logits
    if default == "reordered":  # what a stock OLMo 2 is
        loaded = type(model).from_pretrained(tmp_path / "stock")
        assert torch.equal(loaded(**inputs(family.model_type)).logits, expected)
        return
    for load in (type(model), family.config):
        with pytest.raises(ValueError, match=r"norm_placement: expected .* use hf_cod.to_lns, or pass .*='pre'"):
            load.from_pretrained(tmp_path / "stock")
    loaded = type(model).from_pretrained(tmp_path / "stock", norm_placement="pre")
    assert (loaded(**inputs(family.model_type)).logits - expected).abs().max() <= 1e-6


def test_layers_of_models_of_different_depth_cannot_be_saved(tmp_path):
    model, deeper = tiny_model("cod_llama", "lns"), tiny_model("cod_llama", "lns", num_hidden_layers=6)
    model.model.layers[1] = deeper.model.layers[5]
    with pytest.raises(ValueError, match=r"layers: expected layers from models of one depth, .* of \[4, 6\] layers"):
        model.save_pretrained(tmp_path)
    model.model.layers[1] = fold_lns(deeper).model.layers[1]
    with pytest.raises(ValueError, match="layers: expected layers with a norm placement, got LlamaDecoderLayer"):
        model.save_pretrained(tmp_path)


def test_a_placement_that_was_changed_in_the_config_alone_is_not_saved(tmp_path):
    model = tiny_model("cod_llama", "lns")
    model.config.norm_placement = "pre"
    with pytest.raises(ValueError, match="norm_placement: expected 'lns', as the layers were built, got 'pre'"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


SPELLINGS = {"Qwen2": "Qwen2 and Qwen2.5", "Qwen3": "Qwen3", "Mistral": "Mistral", "Olmo": "OLMo", "Olmo2": "OLMo 2"}


@pytest.mark.parametrize("name", SPELLINGS)
def test_text_families_differ_by_their_names(name):
    folder = Path(hf_cod.models.__file__).parent
    text = (folder / "modeling_cod_llama.py").read_text()
    text = text.replace("of Llama with", f"of {SPELLINGS[name]} with").replace("Llama's", f"{SPELLINGS[name]}'s")
    text = text.replace("Llama", name).replace("llama", name.lower())
    if name == "Olmo":  # its norm has no weights and a fixed epsilon
        text = text.replace(
            "OlmoRMSNorm(config.hidden_size, eps=config.rms_norm_eps)", "OlmoLayerNorm(config.hidden_size)"
        )
        text = text.replace("    OlmoRMSNorm,\n", "").replace(
            "    OlmoModel,\n", "    OlmoLayerNorm,\n    OlmoModel,\n"
        )
    assert (folder / f"modeling_cod_{name.lower()}.py").read_text() == text
