"""Tiny random models of every family, big enough for every code path."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageClassification

from hf_cod.models import FAMILIES, PLACEMENTS

N_LAYERS = 4
POST_LN_FRACTION = 0.3
POST_LAYERS = 2  # ceil(0.3 * 4)
VOCABULARY = 61

SIZES = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": N_LAYERS, "num_attention_heads": 4}
TEXT = {
    **SIZES,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "max_position_embeddings": 64,
}
FIELDS = {
    "cod_llama": TEXT,
    "cod_qwen2": TEXT,
    "cod_qwen3": {**TEXT, "head_dim": 8},
    "cod_mistral": {**TEXT, "sliding_window": 5},
    "cod_olmo": TEXT,
    "cod_olmo2": TEXT,
    "cod_vit": {**SIZES, "image_size": 8, "patch_size": 4, "num_labels": 7},
}
BY_TYPE = {family.model_type: family for family in FAMILIES}
TEXT_TYPES = [name for name in BY_TYPE if name != "cod_vit"]

# Every placement x family that exists; by default every placement of Llama, and of each other family one.
CASES = [
    pytest.param(name, placement, marks=[] if name == "cod_llama" or placement == "sandwich" else pytest.mark.families)
    for name, family in BY_TYPE.items()
    for placement in family.config.valid_placements()
]
TEXT_CASES = [case for case in CASES if case.values[0] != "cod_vit"]
LLAMA_CASES = [("cod_llama", placement) for placement in PLACEMENTS]


def tiny_config(model_type: str, placement: str, **fields):
    own = {"norm_placement": placement, "post_ln_fraction": POST_LN_FRACTION}
    return BY_TYPE[model_type].config(**{**FIELDS[model_type], **own, **fields})


def tiny_model(model_type: str, placement: str, auto=None, seed: int = 0, **fields):
    """A model in eval mode whose every weight was drawn at random: norms and biases too, so that none can hide."""
    if auto is None:
        auto = AutoModelForImageClassification if model_type == "cod_vit" else AutoModelForCausalLM
    torch.manual_seed(seed)
    model = auto.from_config(tiny_config(model_type, placement, **fields)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return model


def tokens(rows: int = 2, length: int = 9, seed: int = 1) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def pixels(rows: int = 2, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def inputs(model_type: str) -> dict[str, torch.Tensor]:
    return {"pixel_values": pixels()} if model_type == "cod_vit" else {"input_ids": tokens()}
