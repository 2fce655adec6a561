"""Tiny models and texts, in the place of those that the pages name."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from examples.tiny_architectures import SEQ2SEQ
from examples.tiny_architectures import build as build_type
from tests.tiny_models import build
from tests.tiny_tokenizers import gpt_like

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
TEXT = "one two three four five six seven eight nine ten a three one four one five nine two six five three five " * 60
TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} {{ eos_token }}{% endfor %}"


def model():
    """Rows of whole blocks, so that three and four bits save something."""
    return build("llama", 4, max_position_embeddings=512, **SIZES)


def save_models(folder: Path) -> Path:
    """`stock`, a Llama, `lns`, the same with LayerNorm Scaling, `t5`, and `mixture`, of experts."""
    model().save_pretrained(folder / "stock")
    torch.manual_seed(0)
    config = AutoConfig.for_model("cod_llama", norm_placement="lns", num_hidden_layers=3, vocab_size=99, **SIZES)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "lns")
    build_type(f"{SEQ2SEQ}t5").save_pretrained(folder / "t5")
    build("mixtral", max_position_embeddings=512, **SIZES).save_pretrained(folder / "mixture")
    tokenizer = gpt_like()
    tokenizer.chat_template = TEMPLATE
    for name in ("stock", "lns", "t5", "mixture"):
        tokenizer.save_pretrained(folder / name)
    return folder


def write_texts(folder: Path) -> None:
    (folder / "questions.jsonl").write_text('{"prompt": "one two", "answer": " three"}\n' * 2)
    for name in ("my.txt", "other.txt"):
        (folder / name).write_text(TEXT)
    turns = [{"role": "user", "content": "one two"}, {"role": "assistant", "content": "three four five"}]
    (folder / "chat.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 20)
    (folder / "chat.jinja").write_text(TEMPLATE)
