"""Names of tensors in checkpoints of families that transformers writes under other names than the model has."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from hf_cod import OwlBnbConfig, pack_sparse, prune, quantize
from tests.tiny_models import build, outputs

_SIZES = {"vocab_size": 99, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def exaone():
    """Its checkpoints have the names of GPT-2."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING["exaone"](**_SIZES, **_TOKENS, intermediate_size=48, num_key_value_heads=2)
    return AutoModelForCausalLM.from_config(config).eval()


def packed(model):
    prune(model, 0.7, "magnitude")
    return pack_sparse(model)


def quantized(model):
    quantize(model, OwlBnbConfig(bits=4))
    return model


@pytest.mark.parametrize("change", [packed, quantized])
@pytest.mark.parametrize("auto", [False, True])
def test_names_of_a_family_that_renames(change, auto, tmp_path):
    model = change(exaone())
    model.save_pretrained(tmp_path / "changed")
    names = load_file(tmp_path / "changed" / "model.safetensors").keys()
    assert any(name.startswith("model.layers.0.self_attn.q_proj.") for name in names)
    loaded = (AutoModelForCausalLM if auto else type(model)).from_pretrained(tmp_path / "changed")
    assert torch.equal(outputs(loaded), outputs(model))
    dense = loaded.dequantize()
    dense.save_pretrained(tmp_path / "dense")
    if auto:  # by its class it has been loaded without the rules
        assert "transformer.h.0.attn.attention.q_proj.weight" in load_file(tmp_path / "dense" / "model.safetensors")
    assert torch.equal(outputs(type(model).from_pretrained(tmp_path / "dense")), outputs(dense))


def test_rules_that_concern_other_weights_stay(tmp_path):
    """Dense experts are written one by one, as in the family's checkpoints."""
    model = build("mixtral")
    quantize(model, OwlBnbConfig(bits=4, exclude=["experts"]))
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert any(".experts.1.w1.weight" in name for name in names)
