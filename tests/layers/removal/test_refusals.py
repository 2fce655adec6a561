"""Layers that `drop` refuses are left out of a plan before anything is measured."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForSequenceClassification,
)

from examples.tiny_architectures import build, tiny_config
from hf_cod import drop, plan_depth
from hf_cod.compression.depth.removal_probe import RemovalProbe

SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}


def classifier(layers=5):
    """Its first layer has no norm before attention, whatever the config says."""
    torch.manual_seed(0)
    shape = {**SIZES, "num_hidden_layers": layers, "initializer_range": 0.3}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    return ModernBertForSequenceClassification(ModernBertConfig(**shape, **tokens)).eval()


@pytest.mark.parametrize("criterion", ["search", "layer_drop", "block_influence", "angular"])
@pytest.mark.parametrize("count", [1, 2])
def test_a_first_layer_of_another_kind_leaves_the_search(criterion, count, caplog, monkeypatch):
    model, removed = classifier(), set()
    _watch(monkeypatch, removed)
    batch = {"input_ids": torch.arange(1, 49).reshape(6, 8)}
    plan = plan_depth(model, count, criterion, batches=[batch], protect=False)
    assert 0 not in plan.layers and 0 not in removed
    assert caplog.text.count("layers 0 are not removed: layers: expected kept layers that the config of") == 1
    if criterion in ("search", "layer_drop"):
        assert plan.costs[0] is None and None not in plan.costs[1:]
    if criterion == "search":
        assert all(0 not in found["layers"] for found in plan.candidates.values())
        (chosen,) = {plan.candidates[name]["loss"] for name in plan.chosen}
        assert chosen == min(found["loss"] for name, found in plan.candidates.items() if name != "intact")
    drop(model, plan.layers)


def _watch(monkeypatch, removed):
    losses = RemovalProbe.losses
    monkeypatch.setattr(
        RemovalProbe,
        "losses",
        lambda self, removals, *args: removed.update(*removals) or losses(self, removals, *args),
    )


def test_layers_that_can_only_be_removed_with_others_stay_in_the_search(caplog):
    """Of Jamba's pattern of two layers a whole period can be removed, but of single layers only the last one."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("jamba")).eval()
    batch = {"input_ids": torch.arange(1, 49).reshape(6, 8)}
    assert plan_depth(model, 1, "layer_drop", batches=[batch], protect=False).layers == [3]
    assert "layers 0, 1, 2 are not removed: layers: expected kept layers" in caplog.text
    caplog.clear()
    plan = plan_depth(model, 2, batches=[batch], protect=False)
    assert None not in plan.costs and "are not removed:" not in caplog.text
    drop(model, plan.layers)


def test_a_set_of_layers_that_is_passed_over_is_named(caplog):
    """Layers 0 and 2 cost least, but no config of Jamba describes a stack of attention alone."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("jamba")).eval()
    with torch.no_grad():
        for layer in (model.model.layers[0], model.model.layers[2]):
            for name, parameter in layer.named_parameters():
                if "out_proj" in name or "down_proj" in name:
                    parameter.zero_()
        ids = torch.arange(1, 49).reshape(6, 8)
        predicted = model(ids).logits.argmax(-1)
    batch = {"input_ids": ids, "labels": torch.cat([ids[:, :1], predicted[:, :-1]], 1)}
    plan = plan_depth(model, 2, batches=[batch], protect=False)
    assert plan.candidates["greedy"]["layers"] == [0, 2] and plan.chosen == ["angular"]
    assert "layers 0, 2 are not removed together: layers: expected kept layers" in caplog.text


@pytest.mark.parametrize(
    ("kind", "removed", "way"),
    [
        ("minimax", [2, 3], "it follows from the number of layers, so none can be removed"),  # a whole period
        ("diffllama", [0], "it follows from the place of a layer, so at most the last layers can be removed"),
        ("afmoe", [0], "keep the layers in which it is False"),
    ],
)
def test_the_way_out_is_one(kind, removed, way):
    model = build(kind)
    with pytest.raises(ValueError, match=rf"^layers: expected kept layers .*; {way}, or use skip$"):
        drop(model, removed)
    kept = {"diffllama": [3], "afmoe": [3]}.get(kind)
    if kept is not None:
        drop(model, kept)


def test_the_way_out_where_a_built_layer_lacks_something():
    model = classifier()
    with pytest.raises(ValueError, match=r"attn_norm.* would be None\); keep the layers without layer.attn_norm"):
        drop(model, 0)
    for layer in model.model.layers:
        layer.mark = 8
    with pytest.raises(ValueError, match=r"mark is 8, would be None\); no layer that it builds has that, so none"):
        drop(model, 4)


class Limit(torch.nn.Module):
    def __init__(self, most):
        super().__init__()
        self.most = most

    def forward(self, x):
        return x.clamp(-self.most, self.most)


@pytest.mark.parametrize("changed", [False, True])
def test_what_returns_its_input_in_eval_mode_is_no_difference(changed, tmp_path):
    """The rates of BEiT's dropout of paths follow from the number of layers."""
    model = build("vision/beit")
    layer = model.base_model.layers[2]
    if changed:  # a limit that only large numbers reach
        layer.drop_path = Limit(1e6)
        with pytest.raises(ValueError, match=r"drop_path\.(most|drop_prob) is"):
            drop(model, [1])
        return
    assert layer.drop_path.drop_prob > 0
    drop(model, [1])
    model.save_pretrained(tmp_path)
    images = torch.rand(2, 3, model.config.image_size, model.config.image_size)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(again(images).logits, model.eval()(images).logits) and len(again.base_model.layers) == 3


def test_layers_that_hold_their_own_index_under_another_name():
    """Such as those of a user's own code; no config can describe other indices."""

    class Numbered(LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            for index, layer in enumerate(self.model.layers):
                layer.position = index

    model = Numbered(LlamaConfig(**SIZES, num_hidden_layers=3))
    with pytest.raises(ValueError, match="each layer holds its own index there, so only the last layers can be rem"):
        drop(model, 1)
    assert drop(model, 2) == [0, 1]
