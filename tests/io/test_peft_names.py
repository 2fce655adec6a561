"""Which names PEFT reads as those of experts is found out from PEFT itself."""

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from examples.tiny_architectures import tiny_config
from hf_cod.io.peft_names import is_misread, is_refused
from tests.tiny_models import build, build_mixture

PARTS = ["gate_proj", "up_proj", "down_proj", "o_proj"]


@pytest.mark.parametrize("kind, expected", [("deepseek_v3", PARTS[:3]), ("mixtral", ["w1", "w3"])])
def test_names_of_mixtures(kind, expected):
    model = build_mixture(kind)
    assert [name for name in (*PARTS, "w1", "w3") if is_misread(model, name)] == expected


def test_other_models_have_none():
    assert not any(is_misread(build("llama"), name) for name in PARTS)


def test_peft_still_refuses_the_output_projection_of_mamba():
    """By a private function: if PEFT renames it or its arguments, no name is refused, and this test fails."""
    model = AutoModelForCausalLM.from_config(tiny_config("mamba"))
    assert [name for name in ("in_proj", "out_proj") if is_refused(model, name)] == ["out_proj"]
    with pytest.raises(ValueError, match="out_proj"):
        get_peft_model(model, LoraConfig(target_modules=["out_proj"]))
