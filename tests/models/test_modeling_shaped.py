"""Shaped models load by each Auto class that loads the stock model."""

import pytest
import torch
import transformers
from transformers import AutoConfig, MusicgenDecoderConfig, MusicgenForCausalLM

from hf_cod import factorize
from hf_cod.models.modeling_shaped import auto_classes, shaped_model, stock_heads
from hf_cod.models.shaping import record_shapes
from tests.tiny_models import build

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
SOUND = {"conv_dim": [16, 16], "conv_stride": [4, 4], "conv_kernel": [4, 4], "num_feat_extract_layers": 2}
SOUND |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "vocab_size": 24}
IMAGE = {"image_size": 16, "patch_size": 8, "decoder_hidden_size": 32, "decoder_intermediate_size": 48}
IMAGE |= {"decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2, "mask_ratio": 0.5}
LISTENS, SEES = {"input_values": torch.linspace(-1, 1, 400)[None]}, {"pixel_values": torch.ones(1, 3, 16, 16)}
# Auto class -> (model type, settings, inputs, layers_path).
HEADS = {
    "AutoModelForCTC": ("wav2vec2", SOUND, LISTENS, None),
    "AutoModelForAudioClassification": ("hubert", SOUND, LISTENS, None),
    "AutoModelForPreTraining": ("vit_mae", IMAGE, {**SEES, "noise": torch.linspace(0, 1, 4)[None]}, "vit.layers"),
}


@pytest.mark.parametrize("auto", HEADS)
def test_heads_beside_text_are_loaded_again(auto, tmp_path):
    kind, settings, inputs, path = HEADS[auto]
    torch.manual_seed(0)
    auto_class = getattr(transformers, auto)
    model = auto_class.from_config(AutoConfig.for_model(kind, **SIZES, **settings)).eval()
    factorize(model, 0.5, method="plain", **({} if path is None else {"layers_path": path}))
    model.save_pretrained(tmp_path)
    again = auto_class.from_pretrained(tmp_path).eval()
    assert torch.equal(again(**inputs).logits, model(**inputs).logits) and type(again) is type(model)
    assert any(".expand." in name for name, _ in again.named_parameters())


@pytest.mark.parametrize("family", ["llama", "bert", "vit", "gpt2"])
def test_each_auto_class_of_the_stock_model_loads_the_shaped_one(family):
    model = build(family)
    stock = stock_heads(type(model.config))
    record_shapes(model, {})
    assert {auto for auto, _ in stock} == {
        auto for auto, cls in auto_classes().items() if cls._model_mapping.get(type(model.config), None) is not None
    }
    first = {}
    for auto, base in stock:
        first.setdefault(auto, base)
    for auto, base in first.items():
        found = auto_classes()[auto]._model_mapping[type(model.config)]
        assert found is shaped_model(base, type(model.config)), auto


def test_a_class_that_no_auto_class_loads_is_named():
    config = MusicgenDecoderConfig(vocab_size=32, num_codebooks=2, hidden_size=32, ffn_dim=48, num_hidden_layers=3)
    model = MusicgenForCausalLM(config)
    with pytest.raises(ValueError, match=r"^model: expected a class that an Auto class loads, .*, got Musicgen"):
        factorize(model, 0.5, method="plain")
