import pytest
import torch

from hf_cod.loading import ModelSettings, from_package, load_model, on_hub
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


def test_a_folder_that_is_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match=r"model: expected a Hub id, a directory with a checkpoint, or a .gguf file"):
        load_model(str(tmp_path))


def test_packages():
    with pytest.raises(ValueError, match=r"expected pip to download hf-cod-no-such-package==0.0.0"):
        from_package("hf-cod-no-such-package", "0.0.0", "file")


def test_the_hub_is_out_of_reach_offline():
    assert on_hub("someone/no-such-model") is False
