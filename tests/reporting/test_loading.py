"""How a directory is loaded, as its card says it, and what the card's metadata say of its base."""

import json
import re
import shlex

import pytest
from huggingface_hub import ModelCard

from hf_cod.io.report import RunReport
from hf_cod.io.requirements import requirement
from hf_cod.reporting.loading import hub_id, loading_of, public_name
from hf_cod.reporting.result_card import write_cards


def written(folder, name, **content):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    "architecture, auto, tag",
    [
        ("LlamaForCausalLM", "AutoModelForCausalLM", "text-generation"),
        ("GPT2LMHeadModel", "AutoModelForCausalLM", "text-generation"),
        ("ShapedBertForMaskedLM", "AutoModelForMaskedLM", "fill-mask"),
        ("CodViTForImageClassification", "AutoModelForImageClassification", "image-classification"),
        ("BertModel", "AutoModel", "feature-extraction"),
    ],
)
def test_the_class_that_loads_an_architecture(architecture, auto, tag, tmp_path):
    found = loading_of(written(tmp_path, "config.json", architectures=[architecture]), "me/it")
    assert f'model = {auto}.from_pretrained("me/it")' in found.python and found.pipeline_tag == tag
    assert found.install == f"pip install torch '{requirement('transformers')}'" and "tokenizer" not in found.python


@pytest.mark.parametrize(
    "files, auto",
    [
        (["tokenizer_config.json"], "AutoTokenizer"),
        (["preprocessor_config.json"], "AutoImageProcessor"),
        (["tokenizer_config.json", "preprocessor_config.json"], "AutoProcessor"),
        (["tokenizer_config.json", "processor_config.json"], "AutoProcessor"),
    ],
)
def test_what_prepares_the_inputs(files, auto, tmp_path):
    for name in files:
        written(tmp_path, name)
    found = loading_of(written(tmp_path, "config.json", architectures=["LlavaForConditionalGeneration"]), "me/it")
    assert f'{auto}.from_pretrained("me/it")' in found.python


@pytest.mark.parametrize(
    "base, kind, packages",
    [
        ({}, "LORA", ["torch", requirement("transformers"), requirement("peft")]),
        ({}, "OWLORE", [requirement("hf_cod", "recovery")]),
        ({"quant_method": "owl_bnb"}, "LORA", [requirement("hf_cod", "bitsandbytes"), requirement("peft")]),
        ({"quant_method": "owl_bnb"}, "OWLORE", [requirement("hf_cod", "bitsandbytes", "recovery")]),
        ({"quant_method": "hf_cod_sparse"}, "LORA", [requirement("hf_cod"), requirement("peft")]),
    ],
)
def test_an_adapter_is_installed_with_the_lowest_versions(base, kind, packages, tmp_path):
    """Those of its base, too."""
    stored = {"quantization_config": base} if base else {}
    config = written(tmp_path / "base", "config.json", architectures=["LlamaForCausalLM"], model_type="llama", **stored)
    adapter = {"base_model_name_or_path": str(config), "peft_type": kind}
    found = loading_of(written(tmp_path / "adapter", "adapter_config.json", **adapter), "me/it")
    assert shlex.split(found.install) == ["pip", "install", *packages]
    assert all(re.search(r">=\d", each) for each in packages if each != "torch")


def test_a_hub_id_is_named_and_a_path_is_not(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    adapter = {"peft_type": "LORA", "auto_mapping": {"base_model_class": "LlamaForCausalLM"}}
    report = RunReport("finetune", "x", {"model": "someone/base"}, {}, {}, {}, ["Done."])
    written(tmp_path / "a", "adapter_config.json", base_model_name_or_path="someone/base", **adapter)
    (card,) = write_cards(tmp_path / "a", report)
    data = ModelCard.load(card).data
    assert (data.base_model, data.base_model_relation, data.library_name) == ("someone/base", "adapter", "peft")
    assert 'base = AutoModelForCausalLM.from_pretrained("someone/base")' in card.read_text()
    (tmp_path / "base").mkdir()
    written(tmp_path / "b", "adapter_config.json", base_model_name_or_path=str(tmp_path / "base"), **adapter)
    (card,) = write_cards(tmp_path / "b", RunReport("finetune", "x", {"model": str(tmp_path / "base")}, {}, {}, {}))
    assert ModelCard.load(card).data.base_model is None and str(tmp_path) not in card.read_text()
    assert hub_id("someone/base") == public_name("someone/base") == "someone/base"
    assert hub_id(str(tmp_path)) is hub_id("./base") is hub_id("a b") is None and public_name("./some/base") == "base"


def test_a_name_cannot_leave_its_place(tmp_path):
    name = '"); import os #<b>|'
    written(tmp_path, "config.json", architectures=["LlamaForCausalLM"])
    (card,) = write_cards(tmp_path, RunReport("prune", name, {"model": name}, {}, {}, {}), name=name)
    text = card.read_text()
    assert "<b>" not in text.replace(json.dumps(name), "") and f"from_pretrained({json.dumps(name)})" in text
    compile(loading_of(tmp_path, name).python, "card", "exec")
