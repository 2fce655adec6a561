import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_cod.training.pretraining.recipes import RECIPES, PretrainSettings, accumulation_steps, model_config

# Size -> peak learning rate, steps, warm-up, parameters in millions; section 5 of arXiv 2502.05795 and its scripts.
PAPER = {
    "130M": (1e-3, 20_000, 2_000, 134.1),
    "250M": (1e-3, 40_000, 4_000, 247.4),
    "350M": (5e-4, 60_000, 6_000, 368.0),
    "1B": (5e-4, 100_000, 10_000, 1339.1),
}


@pytest.mark.parametrize("size", PAPER)
def test_presets_are_the_papers(size):
    recipe = RECIPES[size]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config(recipe, "lns"))
    millions = round(sum(p.numel() for p in model.parameters()) / 1e6, 1)
    assert (recipe.learning_rate, recipe.steps, recipe.warmup_steps, millions) == PAPER[size]
    assert (recipe.batch_size, recipe.sequence_length) == (512, 256)
    assert (recipe.text, recipe.text_config, recipe.stream) == ("allenai/c4", "en", True)
    assert recipe.tokenizer == "google-t5/t5-base"


def test_the_tiny_preset_is_of_the_size_that_a_laptop_trains():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config(RECIPES["tiny"], "pre"))
    assert 2e6 < sum(p.numel() for p in model.parameters()) < 5e6
    assert RECIPES["tiny"].tokens > 10_000_000


def test_a_run_changes_what_it_names_and_keeps_the_rest():
    settings = PretrainSettings(preset="130M", steps=7, learning_rate=1.0, batch_size=8, norm_placement="post")
    recipe = settings.recipe
    assert (recipe.steps, recipe.learning_rate, recipe.batch_size, recipe.sequence_length) == (7, 1.0, 8, 256)
    assert recipe.micro_batch_size == 8, "never more than the batch"
    assert recipe.text == "allenai/c4" and recipe.stream
    own = PretrainSettings(preset="130M", text="my.txt").recipe
    assert (own.text, own.text_config, own.validation_split, own.stream) == ("my.txt", None, None, False)
    assert settings.describe()["steps"] == 7 and settings.describe()["seed"] == 0


def test_accumulation_makes_up_the_batch():
    recipe = RECIPES["130M"]
    assert accumulation_steps(recipe, 1) == 8 and accumulation_steps(recipe, 8) == 1
    with pytest.raises(ValueError, match=r"micro_batch_size: expected batch_size 512 to be a multiple of .* 3 proc"):
        accumulation_steps(recipe, 3)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"preset": "2B"}, "preset: expected one of tiny, 130M"),
        ({"norm_placement": "middle"}, "norm_placement: expected one of pre"),
        ({"precision": "fp8"}, "precision: expected one of bf16"),
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"save_every": 0}, "save_every: expected at least 1, got 0"),
        ({"sequence_length": 1}, "sequence_length: expected at least 2, got 1"),
        ({"learning_rate": -1.0}, "learning_rate: expected a finite number above 0, got -1"),
        ({"learning_rate": float("nan")}, "learning_rate: expected a finite number above 0, got nan"),
        ({"steps": "10"}, "steps: expected an integer or None, got '10'"),
    ],
)
def test_bad_settings(wrong, message):
    with pytest.raises(ValueError, match=message):
        PretrainSettings(**wrong)
