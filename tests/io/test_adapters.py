"""Where a model lies in an output directory, and adapters that stand in its place."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_cod.io.adapters import base_of
from hf_cod.io.files import write_json
from hf_cod.io.models import load_config, load_model
from tests.tiny_models import build


def adapter(folder, base):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base, "peft_type": "LORA"}))
    (folder / "adapter_model.safetensors").touch()
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


def saved_adapter(folder):
    peft = pytest.importorskip("peft")
    build("llama").save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder / "made")
    return folder / "made"


def without_a_weight(made):
    tensors = load_file(made / "adapter_model.safetensors")
    del tensors[min(tensors)]
    save_file(tensors, made / "adapter_model.safetensors")


def with_garbage(made):
    (made / "adapter_model.safetensors").unlink()
    (made / "adapter_model.bin").write_bytes(b"garbage")


def changed(**entries):
    def change(made):
        content = json.loads((made / "adapter_config.json").read_text()) | entries
        write_json(made / "adapter_config.json", {key: value for key, value in content.items() if value is not None})

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda made: (made / "adapter_config.json").unlink(),
            r"adapter_config.json next to adapter_model.safetensors, ",
        ),
        (
            lambda made: (made / "adapter_model.safetensors").unlink(),
            r"adapter_model.safetensors next to adapter_config",
        ),
        (without_a_weight, r"the adapter's weight base_model.*lora_A.weight, got none in .*made"),
        (
            lambda made: save_file({"a": torch.ones(2)}, made / "adapter_model.safetensors"),
            r"the adapter's weight .*, got 'a' in",
        ),
        (with_garbage, "an adapter that PEFT can load, got UnpicklingError"),
        (changed(peft_type=None), "an adapter that PEFT can load, got KeyError"),
        (changed(peft_type="ODD"), "an adapter that PEFT can load, got KeyError"),
        (changed(r=4), "an adapter that PEFT can load, got RuntimeError: .*size mismatch"),
        (changed(lora_alpha=True), "an integer, got True in .*adapter_config.json"),
        (changed(use_rslora="yes"), "True or False, got 'yes' in"),
        (changed(modules_to_save={"a": 1}), r"a list of strings or None, got \{'a': 1\} in"),
        (changed(alora_invocation_tokens=[1, 2]), "an adapter that can be merged into its base, got"),
    ],
)
def test_half_and_damaged_adapters(damage, message, tmp_path):
    made = saved_adapter(tmp_path)
    load_model(str(made))
    damage(made)
    with pytest.raises(ValueError, match=f"expected {message}") as error:
        load_model(str(made))
    assert "\n" not in str(error.value)
