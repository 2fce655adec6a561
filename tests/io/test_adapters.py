"""Where a model lies in an output directory, and adapters that stand in its place."""

import json
import sys

import pytest

from hf_cod.io.adapters import base_of
from hf_cod.io.models import load_config, load_model
from tests.tiny_models import build


def adapter(folder, base):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base, "peft_type": "LORA"}))
    return folder


def test_a_run_of_the_first_version_has_its_model_in_a_folder(tmp_path):
    build("llama").save_pretrained(tmp_path / "model")
    assert load_model(str(tmp_path))[0].config.num_hidden_layers == 4
    build("llama", layers=2).save_pretrained(tmp_path)
    assert load_model(str(tmp_path))[0].config.num_hidden_layers == 2, "what is in the directory itself comes first"


def test_the_config_of_an_adapter_is_that_of_its_base(tmp_path):
    build("llama").save_pretrained(tmp_path / "base")
    made = adapter(tmp_path / "made", str(tmp_path / "base"))
    assert base_of(made) == str(tmp_path / "base") and base_of(tmp_path / "base") is None
    assert load_config(str(made)).num_hidden_layers == 4
    build("llama", layers=2).save_pretrained(made)
    assert base_of(made) is None and load_config(str(made)).num_hidden_layers == 2


def test_without_peft_the_error_says_what_to_install(tmp_path, monkeypatch):
    build("llama").save_pretrained(tmp_path / "base")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"model: the adapter in .*made.* requires the peft package: pip install"):
        load_model(str(adapter(tmp_path / "made", str(tmp_path / "base"))))


def test_an_adapter_needs_a_model_beneath(tmp_path):
    """Not itself, nor another adapter, nor nothing."""
    first, second = adapter(tmp_path / "first", str(tmp_path / "second")), adapter(tmp_path / "second", "base")
    itself = adapter(tmp_path / "run" / "adapter", str(tmp_path / "run"))
    for made in (first, itself):
        with pytest.raises(ValueError, match="base_model_name_or_path: expected a model, got another adapter in"):
            load_model(str(made))
    for base, told in ((None, "the base model"), ("", "the base model"), (5, "text, got 5")):
        with pytest.raises(ValueError, match=f"base_model_name_or_path: expected {told}"):
            load_model(str(adapter(second, base)))
    (second / "adapter_config.json").write_text("[1]")
    with pytest.raises(ValueError, match="adapter: expected"):
        load_model(str(second))
