"""What config.json of quantized and packed models says, and that the model in memory is of its family."""

import copy
import json
import logging
import pickle

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_cod import OwlBnbConfig, factorize, pack_sparse, prune, quantize
from hf_cod.models.stored_config import FAMILY_TYPE, REQUIRES
from tests.tiny_models import build

from .tiny import tiny_model


@pytest.fixture
def quantized():
    return quantized_of(wide())


def wide():
    return build("llama", hidden_size=64, intermediate_size=128)


def quantized_of(model):
    quantize(model, OwlBnbConfig(bits=3, block=32))
    return model


def written(folder):
    return json.loads((folder / "config.json").read_text())


@torch.no_grad()
def logits(model):
    return model(torch.arange(3, 12)[None]).logits


def test_a_model_in_memory_is_of_its_family(quantized, tmp_path):
    quantized.save_pretrained(tmp_path)
    assert (written(tmp_path)["model_type"], written(tmp_path)[FAMILY_TYPE]) == (REQUIRES, "llama")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for model in (quantized, loaded):
        assert type(model) is LlamaForCausalLM and isinstance(model.config, LlamaConfig)
        assert model.config.model_type == model.config.to_dict()["model_type"] == "llama"
        assert FAMILY_TYPE not in model.config.to_dict()
        for same in (copy.deepcopy(model.config), pickle.loads(pickle.dumps(model.config))):
            assert type(same) is type(model.config) and same.to_dict() == model.config.to_dict()
    assert type(AutoModelForCausalLM.from_config(loaded.config)) is LlamaForCausalLM
    assert type(AutoConfig.from_pretrained(tmp_path)) is LlamaConfig
    assert torch.equal(logits(loaded), logits(quantized))


def test_a_class_of_a_family_reads_it_without_a_warning(quantized, tmp_path, caplog):
    quantized.save_pretrained(tmp_path)
    reader = logging.getLogger("transformers.configuration_utils")
    with caplog.at_level("WARNING"):
        reader.addHandler(caplog.handler)
        try:
            loaded = LlamaForCausalLM.from_pretrained(tmp_path)
        finally:
            reader.removeHandler(caplog.handler)
    assert not any("model of type" in record.getMessage() for record in caplog.records)
    assert loaded.config.model_type == "llama" and torch.equal(logits(loaded), logits(quantized))


def test_a_model_that_is_dense_again_is_a_stock_checkpoint(quantized, tmp_path):
    quantized.dequantize().save_pretrained(tmp_path / "quantized")
    packed = build("llama")
    prune(packed, 0.6, "magnitude")
    pack_sparse(packed).save_pretrained(tmp_path / "packed")
    assert written(tmp_path / "packed")["model_type"] == REQUIRES
    AutoModelForCausalLM.from_pretrained(tmp_path / "packed").dequantize().save_pretrained(tmp_path / "dense")
    for name in ("quantized", "dense"):
        assert written(tmp_path / name)["model_type"] == "llama" and FAMILY_TYPE not in written(tmp_path / name)


@pytest.mark.parametrize("kind", ["cod_llama", "shaped"])
def test_code_beside_weights_that_it_cannot_read_is_not_named(kind, tmp_path):
    model = tiny_model("cod_llama", "lns") if kind == "cod_llama" else wide()
    if kind == "shaped":
        factorize(model, 0.9, "plain")
    family = type(model.config)
    model.save_pretrained(tmp_path / "dense")
    assert "auto_map" in written(tmp_path / "dense")
    quantized_of(model).save_pretrained(tmp_path / "out")
    assert "auto_map" not in written(tmp_path / "out") and written(tmp_path / "out")["model_type"] == REQUIRES
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(loaded) is type(model) and torch.equal(logits(loaded), logits(model))
    again = loaded.dequantize()
    again.save_pretrained(tmp_path / "again")
    assert "auto_map" in written(tmp_path / "again") and type(again.config) is family


def test_an_unknown_family_is_named(quantized, tmp_path):
    quantized.save_pretrained(tmp_path)
    content = {**written(tmp_path), FAMILY_TYPE: "llama-9"}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"{FAMILY_TYPE}: expected a model type of transformers, got 'llama-9'"):
        AutoConfig.from_pretrained(tmp_path)
