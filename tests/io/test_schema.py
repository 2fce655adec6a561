"""What config.json says of our formats, changed in any way: refused in one line, or what it says."""

import copy
import json
import re

import pytest
import torch
from hypothesis import given, settings
from transformers import AutoModelForCausalLM

from hf_cod import OwlBnbConfig, RankPlan, SparseConfig, factorize
from tests.io.mutations import mutated
from tests.io.test_reading import LONG
from tests.tiny_models import build

CONFIGS = {
    "quantized": OwlBnbConfig(bits=3.5, skip=["lm_head"], compute_dtype="bfloat16", modules={"layers.0.up": 3}),
    "packed": SparseConfig(minimum=0.4, modules={"layers.0.up": 7}),
}


def check_refusal(error):
    assert re.match(r"\S[^\n]*: expected [^\n]*", str(error)) and "\n" not in str(error), str(error)
    assert str(error).isprintable() and len(str(error)) < 1000, str(error)


def parsed(raw):
    """What transformers reads of a config.json; None where that is its error, not ours."""
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return None


@pytest.mark.parametrize("examples", LONG)
@pytest.mark.parametrize("name", CONFIGS)
def test_quantization_configs(name, examples):
    whole = CONFIGS[name]

    @settings(max_examples=examples)
    @given(mutated(whole.to_dict()))
    def check(raw):
        content = parsed(raw)
        if not isinstance(content, dict):
            return
        try:
            found = type(whole).from_dict(copy.deepcopy(content))
        except ValueError as error:
            check_refusal(error)
            return
        told = found.to_dict()
        assert {key: told[key] for key in content} == content

    check()


def test_whole_ones_come_back():
    for whole in CONFIGS.values():
        assert type(whole).from_dict(whole.to_dict()).to_dict() == whole.to_dict()


@pytest.mark.parametrize("dtype", [torch.int8, "int8", "uint8", "float8_e4m3fn", "bool", "nn", "Tensor", 16, 1.0, []])
def test_dtypes_to_compute_in(dtype):
    with pytest.raises(ValueError, match=r"compute_dtype: expected the name of a dtype"):
        OwlBnbConfig(compute_dtype=dtype)


@pytest.mark.parametrize("examples", LONG)
def test_module_shapes(examples):
    """Built without memory for weights, as from_pretrained does: so a rank of terabytes would show here, too."""
    model = build("llama")
    names = ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"]
    factorize(model, RankPlan("parameter_share", 0.9, dict.fromkeys(names, 3), "given"), "plain")
    config, most = model.config, sum(p.numel() for p in build("llama").parameters())

    @settings(max_examples=examples)
    @given(mutated(config.module_shapes))
    def check(raw):
        config.module_shapes = parsed(raw)
        try:
            with torch.device("meta"):
                made = AutoModelForCausalLM.from_config(config)
        except ValueError as error:
            check_refusal(error)
            return
        assert sum(p.numel() for p in made.parameters()) <= most

    check()
