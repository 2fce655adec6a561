"""Which names PEFT reads as those of experts is found out from PEFT itself."""

import pytest

from hf_cod.io.peft_names import is_misread
from tests.tiny_models import build, build_mixture

PARTS = ["gate_proj", "up_proj", "down_proj", "o_proj"]


@pytest.mark.parametrize("kind, expected", [("deepseek_v3", PARTS[:3]), ("mixtral", ["w1", "w3"])])
def test_names_of_mixtures(kind, expected):
    model = build_mixture(kind)
    assert [name for name in (*PARTS, "w1", "w3") if is_misread(model, name)] == expected


def test_other_models_have_none():
    assert not any(is_misread(build("llama"), name) for name in PARTS)
