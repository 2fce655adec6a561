import json

import pytest
import torch

from hf_cod.io.models import ModelSettings, load_model, load_tokenizer
from tests.tiny_models import build
from tests.tiny_tokenizers import gpt_like


def test_a_checkpoint_comes_back_with_its_head_and_tokenizer(tmp_path):
    for family in ("llama", "bert", "vit"):
        model = build(family)
        model.save_pretrained(tmp_path / family)
        loaded, _ = load_model(str(tmp_path / family), ModelSettings(device="cpu"))
        assert type(loaded) is type(model) and not loaded.training
    gpt_like().save_pretrained(tmp_path / "llama")
    assert load_model(str(tmp_path / "llama"))[1]("one two")["input_ids"]


def test_dtype(tmp_path):
    build("llama", dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert load_model(str(tmp_path))[0].dtype == torch.bfloat16
    assert load_model(str(tmp_path), ModelSettings(dtype="float32"))[0].dtype == torch.float32
    with pytest.raises(ValueError, match="dtype: expected one of auto, float32"):
        ModelSettings(dtype="int3")


def test_a_checkpoint_without_its_head_is_loaded_headless(tmp_path):
    model = build("bert")
    model.bert.save_pretrained(tmp_path)
    config = model.config
    config.architectures = ["BertForMaskedLM"]
    config.save_pretrained(tmp_path)
    loaded, _ = load_model(str(tmp_path))
    assert type(loaded).__name__ == "BertModel"


@pytest.mark.parametrize("name", ["no/such-model", "no-such-directory", "missing.gguf"])
def test_no_such_model(name, tmp_path):
    with pytest.raises(ValueError, match="model: expected"):
        load_model(str(tmp_path / name) if name.endswith("gguf") else name)


def test_a_file_that_is_no_gguf(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"model: expected a directory or a .gguf file, .* pass the directory"):
        load_model(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("content", [b"", b"PK" + bytes(99), b"GGUF\3\0\0\0", b"GGUF\3\0\0\0" + bytes([255] * 99)])
def test_a_damaged_gguf(content, tmp_path):
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=r"model: expected a Hub id, .*, got '.*x\.gguf': .+"):
        load_model(str(tmp_path / "x.gguf"))


def test_a_folder_that_is_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match=r"model: expected a Hub id, a directory with a checkpoint, or a .gguf file"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_bad_device(device):
    with pytest.raises(ValueError, match="device: expected cpu, cuda"):
        ModelSettings(device=device)


def test_our_own_models_come_back_with_their_heads(tmp_path):
    from hf_cod.models import (
        CodLlamaConfig,
        CodLlamaForSequenceClassification,
        CodViTConfig,
        CodViTForImageClassification,
    )

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}
    text = CodLlamaForSequenceClassification(CodLlamaConfig(**sizes, vocab_size=99, pad_token_id=0))
    for name, model in (
        ("text", text),
        ("image", CodViTForImageClassification(CodViTConfig(**sizes, image_size=16, patch_size=8))),
    ):
        model.save_pretrained(tmp_path / name)
        assert type(load_model(str(tmp_path / name))[0]) is type(model)
    torch.save({}, tmp_path / "text" / "model.safetensors")
    with pytest.raises(ValueError, match="model: expected"):
        load_model(str(tmp_path / "text"))


@pytest.mark.parametrize(
    "name, text",
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", None),
        ("tokenizer_config.json", "5"),
        ("tokenizer_config.json", '{"tokenizer_class": 5}'),
    ],
)
def test_a_damaged_tokenizer_is_an_error_and_a_missing_one_is_not(name, text, tmp_path):
    build("llama").save_pretrained(tmp_path)
    assert load_model(str(tmp_path))[1] is None
    gpt_like().save_pretrained(tmp_path)
    (tmp_path / name).unlink()
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(
        ValueError, match=r"tokenizer: expected tokenizer files that .*, got [A-Za-z]+ in .*: .+"
    ) as error:
        load_model(str(tmp_path))
    assert repr(str(tmp_path)) in str(error.value)


def test_a_tokenizer_alone(tmp_path):
    gpt_like().save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path))("one two")["input_ids"]


@pytest.mark.parametrize(
    "file, text, told",
    [
        (None, None, r"tokenizer: expected tokenizer files that transformers can read, got .*"),
        ("tokenizer.json", "{", r"tokenizer: expected tokenizer files that transformers can read, got .*"),
        ("tokenizer_config.json", "5", r"tokenizer: expected tokenizer files that transformers can read, got .*"),
        ("config.json", '{"architectures": 5}', r"architectures: expected a list, got 5 in '.*config\.json'"),
    ],
)
def test_a_tokenizer_that_cannot_be_read(file, text, told, tmp_path):
    if file is not None:
        gpt_like().save_pretrained(tmp_path)
        (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=told) as error:
        load_tokenizer(str(tmp_path))
    assert str(tmp_path) in str(error.value)
    with pytest.raises(ValueError, match="tokenizer: expected tokenizer files"):
        load_tokenizer("someone/no-such-tokenizer")


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2", "bert"])
def test_a_directory_without_tokenizer(name, tmp_path):
    """The classes of some models are made without files, with no tokens but the special ones."""
    build(name).save_pretrained(tmp_path)
    assert load_model(str(tmp_path))[1] is None
    with pytest.raises(ValueError, match="tokenizer: expected tokenizer files"):
        load_tokenizer(str(tmp_path))


def test_a_revision_is_for_the_hub(tmp_path):
    build("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"revision: expected none with the local model '.*', got 'v2'"):
        load_model(str(tmp_path), revision="v2")


def test_code_in_the_checkpoint_is_named_with_the_option_that_runs_it(tmp_path):
    build("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "zed", "auto_map": {"AutoConfig": "configuration_zed.ZedConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "configuration_zed.py").write_text("raise RuntimeError('it ran')\n")
    with pytest.raises(ValueError, match=r"^trust_remote_code: expected True \(--trust-remote-code on"):
        load_model(str(tmp_path))
