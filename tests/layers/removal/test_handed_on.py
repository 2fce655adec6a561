import pytest
import torch

from examples.tiny_architectures import Case
from hf_cod import drop, find_decoder_layers, skip
from hf_cod.layers.removal.arranging import arranged
from tests.layers.removal.references import with_block
from tests.layers.removal.test_drop import output, snapshot, two_towers

IMAGE = {"input_ids": torch.tensor([[3, 98, 98, 98, 98, 5]]), "pixel_values": torch.rand(1, 3, 16, 16)}


def passed_through(model, stack, layer, batch):
    """The output of the intact model if a layer of a tower returns its input."""
    handle = find_decoder_layers(model, stack)[layer].register_forward_hook(
        lambda module, args, output: (args[0], *output[1:]) if isinstance(output, tuple) else args[0]
    )
    try:
        return output(model, batch)
    finally:
        handle.remove()


@pytest.mark.parametrize("feature", [-2, -1, 2, [-4, -1]])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_the_features_of_a_tower_are_those_of_the_same_layer(feature, layer, tmp_path):
    """LLaVA reads the state before the last layer: without the last layer, that of the last one."""
    model = two_towers(vision_feature_layer=feature)
    model.config.image_token_id = 98
    expected = passed_through(model, "vision", layer, IMAGE)
    before = snapshot(model)
    with skip(model, layer, "vision"):
        torch.testing.assert_close(output(model, IMAGE), expected, atol=1e-6, rtol=1e-6)
    assert snapshot(model) == before
    drop(model, layer, "vision")
    torch.testing.assert_close(output(model, IMAGE), expected, atol=1e-6, rtol=1e-6)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(output(loaded, IMAGE), expected, atol=1e-6, rtol=1e-6)


def test_two_states_that_would_be_the_same_are_refused():
    model = two_towers(vision_feature_layer=[-2, -1])
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"^layers: expected one kept layer for each of vision_feature_layer, got"):
        drop(model, 2, "vision")
    assert snapshot(model) == before
    drop(model, 0, "vision")
    assert model.config.vision_feature_layer == [-2, -1]


@pytest.mark.parametrize(
    ("kind", "name", "removed", "left"),
    [
        ("vision-language/qwen2_5_vl", "fullatt_block_indexes", 2, [1, 2]),  # counted by layer
        ("vision-language/qwen2_5_vl", "fullatt_block_indexes", 1, [2]),
        ("vision-language/qwen3_vl", "deepstack_visual_indexes", 1, [0, 2]),  # the state after a layer
        ("vision-language/qwen3_vl", "deepstack_visual_indexes", 2, [1, 2]),
        ("vision-language/mllama", "intermediate_layers_indices", 1, [0, 1]),
        ("vision-language/mllama", "intermediate_layers_indices", 2, [0, 1]),
    ],
)
def test_fields_that_name_layers_of_a_tower(kind, name, removed, left):
    """With the model as it is built, indices are [1, 3], or [0, 2] for Mllama."""
    model = Case(kind).build()
    config = model.config.vision_config
    before = list(getattr(config, name))
    with skip(model, removed, "vision"):
        assert list(getattr(config, name)) == left
    assert list(getattr(config, name)) == before
    drop(model, removed, "vision")
    assert list(getattr(model.config.vision_config, name)) == left


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("vision-language/qwen3_vl", "deepstack_visual_indexes"),
        ("vision-language/mllama", "intermediate_layers_indices"),
    ],
)
def test_the_first_state_after_a_removed_first_layer_is_refused(kind, name):
    model = Case(kind).build()
    setattr(model.config.vision_config, name, [0, 2])
    with pytest.raises(ValueError, match=rf"^layers: expected one kept layer for each of {name}"):
        drop(model, 0, "vision")


@pytest.mark.parametrize("feature", [-2, -1, 2, [-4, -1]])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_features_after_a_layer_that_runs_twice_are_those_after_its_second_time(feature, layer):
    model = two_towers(vision_feature_layer=feature)
    model.config.image_token_id = 98
    expected = output(with_block(model, layer, layer + 1, layers_path="vision"), IMAGE)
    with arranged(model, lambda stack: sorted([*range(3), layer]), "vision"):
        assert torch.equal(output(model, IMAGE), expected)
