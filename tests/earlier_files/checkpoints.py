"""Tiny checkpoints of every kind, and what else is written of tiny models."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageClassification, PreTrainedTokenizerFast

from hf_cod import (
    OwlBnbConfig,
    WidthPlan,
    drop,
    drop_layers,
    factorize,
    narrow,
    pack_sparse,
    plan_depth,
    prune,
    quantize,
)

SOURCE, WIDE = "models/source", "models/wide"
WORDS = "a the of in on by an old new red big two six dog cat sea sun day man she he it saw ate had ran met and or but"
SPECIAL = ["<unk>", "<eos>"]
VOCABULARY = len(SPECIAL) + len(WORDS.split())
SIZES = {"num_hidden_layers": 4, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4}
# Rows of whole blocks, so that quantized ones are smaller.
WIDE_SIZES = {"num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
TEXT_SIZES = {"num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 64}
SPECIAL_TOKENS = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": None}
SMALL = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
# Model type -> config values of a small model; all placements occur.
FAMILIES = {
    "cod_llama": {"norm_placement": "lns", "num_hidden_layers": 3},
    "cod_qwen2": {"norm_placement": "post"},
    "cod_qwen3": {"norm_placement": "scaled_init", "head_dim": 8},
    "cod_mistral": {"norm_placement": "mix", "post_ln_fraction": 0.3, "sliding_window": 4},
    "cod_olmo": {"norm_placement": "deepnorm"},
    "cod_olmo2": {"norm_placement": "reordered"},
    "cod_vit": {"norm_placement": "pre", "image_size": 8, "patch_size": 4, "num_labels": 3},
    "cod_llama_sandwich": {"norm_placement": "sandwich"},
}
WITH_CODE = "cod_llama"


def text() -> str:
    """Sentences that a tiny model can learn a little of: words follow one another by a seeded table."""
    drawn = random.Random(0)
    words = WORDS.split()
    after = {word: drawn.sample(words, 4) for word in words}
    line, lines = ["the"], []
    for _ in range(1200):
        line.append(drawn.choice(after[line[-1]]))
        if len(line) == 12:
            lines.append(" ".join(line))
            line = [line[-1]]
    return "\n".join(lines) + "\n"


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS.split()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=SPECIAL[0], eos_token=SPECIAL[1])


def model_of(kind: str, **values: Any) -> Any:
    """A model whose every weight, of norms and biases too, was drawn at random."""
    auto = AutoModelForImageClassification if kind == "cod_vit" else AutoModelForCausalLM
    special = {} if kind == "cod_vit" else SPECIAL_TOKENS
    torch.manual_seed(0)
    model = auto.from_config(AutoConfig.for_model(kind, initializer_range=0.2, **special, **values)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def input_ids() -> torch.Tensor:
    return torch.randint(len(SPECIAL), VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(1))


def pixel_values() -> torch.Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def token_batches() -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(len(SPECIAL), VOCABULARY, (4, 8), generator=torch.Generator().manual_seed(2))
    return [{"input_ids": part} for part in ids.split(2)]


def load(path: str = SOURCE) -> Any:
    return AutoModelForCausalLM.from_pretrained(path)


@torch.no_grad()
def outputs(model: Any) -> torch.Tensor:
    vision = model.main_input_name == "pixel_values"
    given = {"pixel_values": pixel_values()} if vision else {"input_ids": input_ids()}
    return model.eval()(**given).logits.clone()


def save(path: str, model: Any, logits: dict[str, torch.Tensor], code: bool = False) -> None:
    """Saves a model and what it computes, without the code that it would bring if that is not asked for."""
    logits[path] = outputs(model)
    model.save_pretrained(path)
    if not code:
        without_code(Path(path))


def without_code(path: Path) -> None:
    """Nor with the model card that PEFT writes."""
    for file in [*path.rglob("*.py"), *path.rglob("README.md")]:
        file.unlink()


def write_compressed(logits: dict[str, torch.Tensor]) -> None:
    """A checkpoint of each kind that stores something else than the matrices of a stock model."""
    made: dict[str, Callable[[Any], Any]] = {
        "three": lambda model: quantize(model, OwlBnbConfig(bits=3)),
        "mixed": lambda model: quantize(model, OwlBnbConfig(bits=3.8, block=32), batches=token_batches()),
        "packed": lambda model: (prune(model, 0.7, "magnitude"), pack_sparse(model)),
        "narrowed": lambda model: narrow(model, WidthPlan.load("plans/width.json"), batches=token_batches()),
        "narrowed-bias": lambda model: narrow(
            model, WidthPlan.load("plans/width.json"), compensation="bias", batches=token_batches()
        ),
        "factorized": lambda model: factorize(model, 0.7, batches=token_batches()),
        "oats": lambda model: factorize(model, 0.5, "oats", batches=token_batches()),
        "oats-packed": lambda model: (factorize(model, 0.5, "oats", batches=token_batches()), pack_sparse(model, 0.3)),
        "factorized-three": lambda model: (
            factorize(model, 0.7, batches=token_batches()),
            quantize(model, OwlBnbConfig(bits=3, double_quant=False), batches=token_batches()),
        ),
        "dropped": lambda model: drop_layers(
            model, plan_depth(model, 2, "block_influence", batches=token_batches()), "linear", batches=token_batches()
        ),
    }
    for name, change in made.items():
        model = load(WIDE if name in ("three", "mixed") else SOURCE)
        change(model)
        save(f"models/{name}", model, logits)
    tokenizer().save_pretrained("models/factorized")  # which is healed
    gpt2 = model_of("gpt2", n_layer=2, n_embd=16, n_head=2, n_positions=16, vocab_size=VOCABULARY)
    factorize(gpt2, 0.6, "plain")
    save("models/factorized-gpt2", gpt2, logits)


def write_families(logits: dict[str, torch.Tensor]) -> None:
    for name, values in FAMILIES.items():
        kind = name.removesuffix("_sandwich")
        model = model_of(kind, **{**SMALL, **({} if kind == "cod_vit" else TEXT_SIZES), **values})
        save(f"models/{name}", model, logits, code=name == WITH_CODE)
        if name == WITH_CODE:
            drop(model, [1])
            factorize(model, 0.7, "plain")
            save("models/cod_llama-dropped-factorized", model, logits)
