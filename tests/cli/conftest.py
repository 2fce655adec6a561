"""A tiny model with its tokenizer and a text, to run commands on."""

import pytest

from tests.cli.runs import TEXT
from tests.tiny_models import build
from tests.tiny_tokenizers import gpt_like


@pytest.fixture
def checkpoint(tmp_path):
    build("llama").save_pretrained(tmp_path / "model")
    gpt_like().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path
