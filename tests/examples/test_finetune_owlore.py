"""The two OwLore examples, through their command lines, on an embedded model and novel."""

import importlib.util
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

EXAMPLES = Path(__file__).parents[2] / "examples"
QUICK = ["--steps", "6", "--batch-size", "4", "--n-active", "3", "--interval", "2", "--rank", "16"]
LENGTH = {"finetune_owlore": "--sequence-length", "sft_owlore_trl": "--max-length"}


@pytest.mark.parametrize("name", LENGTH)
def test_learns_and_what_it_saves_loads(name, tmp_path):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    before, after = example.main([*QUICK, LENGTH[name], "64", "--output", str(tmp_path)])
    assert after < before
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.num_hidden_layers == 12
