"""What a model does to a layer by its index, outside of the layer: removal has to leave it to the same layers."""

import pytest
import torch
from transformers import (
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    DebertaV2Config,
    DebertaV2Model,
    LlamaConfig,
    LlamaModel,
)

import hf_cod.compression.depth.criteria
from examples.tiny_architectures import Case
from hf_cod import drop, plan_depth, skip
from hf_cod.layers.removal.arranging import arranged
from tests.layers.removal.test_drop import snapshot

SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}


def check_refused(model, layer, stack, match):
    before = snapshot(model)
    for remove in (lambda: drop(model, layer, stack), skip(model, layer, stack).__enter__):
        with pytest.raises(ValueError, match=match):
            remove()
        assert snapshot(model) == before


class Adding(LlamaModel):
    """Adds something after the layer with index 1, whichever that is."""

    def forward(self, input_ids, **kwargs):
        handle = self.layers[1].register_forward_hook(lambda module, args, output: output + 1)
        try:
            return super().forward(input_ids, **kwargs)
        finally:
            handle.remove()


def test_something_that_is_added_after_a_layer_by_its_index():
    torch.manual_seed(0)
    model = Adding(LlamaConfig(**SIZES)).eval()
    check_refused(model, 0, None, "^layers: expected layers that Adding treats alike.*layer 2 gets other values")
    check_refused(model, 1, None, "layer 2 gets other values")
    for layer in (3, 2):
        drop(model, layer)


@pytest.mark.parametrize("criterion", ["layer_drop", "block_influence", "search"])
def test_a_plan_takes_other_layers_and_says_so_before_the_work(criterion, monkeypatch, caplog):
    torch.manual_seed(0)
    model, batch = Adding(LlamaConfig(**SIZES)).eval(), {"input_ids": torch.arange(1, 25).reshape(3, 8)}
    plan = plan_depth(model, 2, criterion, batches=[batch], protect=False)
    assert plan.layers == [2, 3] and "layers 0, 1 are not removed: layers: expected layers that Adding" in caplog.text
    monkeypatch.setattr(hf_cod.compression.depth.criteria, "RemovalProbe", None)
    with pytest.raises(ValueError, match=r"n_removed: expected at most 2 layers that can be removed, got 3; layers: "):
        plan_depth(model, 3, criterion, batches=[batch], protect=False)


@pytest.mark.parametrize("layer", [0, 1])
def test_features_of_images_that_are_added_after_the_first_layers_of_the_text(layer):
    """Qwen3-VL adds those of its vision tower's second and last layer after layers 0 and 1."""
    model = Case("vision-language/qwen3_vl").build()
    check_refused(model, layer, "text", r"^layers: expected layers that Qwen3VL.* treats alike.* gets other values")
    drop(model, 2, "text")


def test_a_convolution_after_the_first_layer():
    model = DebertaV2Model(DebertaV2Config(**SIZES, conv_kernel_size=3)).eval()
    check_refused(model, 0, None, "layer 1 gets other values")
    drop(model, 1)


def test_states_that_another_part_of_the_model_reads():
    """CLIPSeg decodes the states after two layers of its vision tower, which a field outside of its config names."""
    tower = {**{k: v for k, v in SIZES.items() if k != "vocab_size"}, "image_size": 16, "patch_size": 8}
    text = {**SIZES, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = CLIPSegConfig(
        text_config=text, vision_config=tower, extract_layers=[0, 2], projection_dim=16, reduce_dim=8
    )
    model = CLIPSegForImageSegmentation(config).eval()
    check_refused(model, 1, "vision", "^layers: expected layers that CLIPSeg.* treats alike")
    drop(model, 3, "vision")


def test_a_model_that_does_not_run_on_a_small_input_is_named(caplog):
    """UDOP reads the places of words on a page."""
    drop(Case("vision-language/udop").build(), 2)
    assert "UdopForConditionalGeneration was not run to find out what it does at a layer by its index" in caplog.text


def test_states_that_a_tower_hands_on_are_compared(caplog):
    drop(Case("vision-language/llava+images").build(), 1, "vision")
    assert not caplog.text


def test_a_repetition_that_moves_what_is_added_by_index_is_refused():
    model = Adding(LlamaConfig(**SIZES)).eval()
    before = snapshot(model)
    for order in ([0, 0, 1, 2, 3], [0, 1, 1, 2, 3]):
        with pytest.raises(ValueError, match="with the repeated layers it does by index what belongs to other ones"):
            arranged(model, lambda stack, order=order: order, None).__enter__()
        assert snapshot(model) == before
    with arranged(model, lambda stack: [0, 1, 2, 3, 2, 3], None):
        assert len(model.layers) == 6
