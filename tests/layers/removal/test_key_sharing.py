import pytest
import torch
from transformers import AutoModelForCausalLM

from examples.tiny_architectures import tiny_config
from hf_cod import diagnose, drop, find_decoder_layers, skip
from hf_cod.layers.removal.arranging import arranged
from tests.layers.removal.references import with_block

IDS = torch.arange(3, 15)[None]
WINDOW, FULL = "sliding_attention", "full_attention"
KINDS = ["gemma3n_text", "gemma4_text", "gemma4_unified_text"]
# Layers 6 and 7 use the keys and values of layer 3, and layer 5 those of layer 4.
TYPES = [WINDOW, FULL, WINDOW, FULL, WINDOW, WINDOW, FULL, FULL]


def model_of(kind):
    values = tiny_config(kind).to_dict() | {"num_hidden_layers": 8, "layer_types": TYPES, "num_kv_shared_layers": 3}
    if kind == "gemma3n_text":
        values |= {"intermediate_size": [96] * 8, "activation_sparsity_pattern": [0.5] + [0.0] * 7}
    else:
        values |= {"global_head_dim": 16}
        values.pop("per_layer_config")  # the class makes one from layer_types
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(type(tiny_config(kind)).from_dict(values)).float().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape))
    return model


def output(model):
    with torch.no_grad():
        return model(input_ids=IDS)[0]


def generated(model, **options):
    return model.generate(IDS, max_new_tokens=8, do_sample=False, **options)


@pytest.mark.parametrize("removed", [[0], [1, 2], [5], [7], [0, 1, 6], [4, 5]])
@pytest.mark.parametrize("kind", KINDS)
def test_layers_without_users_of_their_keys_are_removed(kind, removed, tmp_path):
    model, reference = model_of(kind), model_of(kind)
    stack = find_decoder_layers(reference)
    for index in removed:
        stack[index].forward = lambda hidden, *_, **__: hidden
    expected, intact = output(reference), output(model)
    with skip(model, removed):
        torch.testing.assert_close(output(model), expected, atol=0, rtol=0)
        tokens = generated(model)
    torch.testing.assert_close(output(model), intact, atol=0, rtol=0)
    drop(model, removed)
    assert model.config.num_kv_shared_layers == 3 - sum(index > 4 for index in removed)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    for each in (model, loaded):
        torch.testing.assert_close(output(each), expected, atol=1e-5, rtol=1e-5)
        assert all(torch.equal(generated(each, use_cache=cached), tokens) for cached in (True, False))


@pytest.mark.parametrize("kind", KINDS)
def test_keys_that_a_kept_layer_uses_are_kept(kind):
    model = model_of(kind)
    intact, config = output(model), model.config.to_dict()
    message = r"^layers: expected to keep layer 3, whose keys and values layers \[7\] use, .* any layers but \[3, 4\]$"
    with pytest.raises(ValueError, match=message):
        drop(model, [3, 6])
    with pytest.raises(ValueError, match=message), skip(model, [3, 6]):
        pass
    torch.testing.assert_close(output(model), intact, atol=0, rtol=0)
    assert model.config.to_dict() == config


def test_without_users_the_layer_itself_can_be_removed(tmp_path):
    model = model_of("gemma3n_text")
    with skip(model, [3, 6, 7]):
        expected = output(model)
    drop(model, [3, 6, 7])
    drop(model, [4])  # the last user
    assert model.config.num_kv_shared_layers == 0
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(output(loaded), output(model), atol=1e-5, rtol=1e-5)
    assert not torch.equal(output(model), expected)


def test_a_type_of_the_last_layer_that_the_config_would_change_is_refused_in_one_line():
    """Gemma 4 makes the attention of its last layer full attention."""
    model = model_of("gemma4_text")
    reference, intact = model_of("gemma4_text"), output(model)
    stack = find_decoder_layers(reference)
    for index in (6, 7):
        stack[index].forward = lambda hidden, *_, **__: hidden
    with skip(model, [6, 7]):
        torch.testing.assert_close(output(model), output(reference), atol=0, rtol=0)
    with pytest.raises(ValueError, match=r"^layers: expected kept layers that the config of Gemma4ForCausalLM .*skip$"):
        drop(model, [6, 7])
    torch.testing.assert_close(output(model), intact, atol=0, rtol=0)


def test_diagnosis_of_layers_that_share_keys():
    model = model_of("gemma4_text")
    report = diagnose(model, batches=[{"input_ids": IDS}], show_progress=False)
    states = []
    handles = [
        layer.register_forward_hook(lambda m, args, out: states.append((args[0], out)))
        for layer in find_decoder_layers(model)
    ]
    output(model)
    for handle in handles:
        handle.remove()
    angles = [torch.arccos(torch.cosine_similarity(x[0, -1], y[0, -1], dim=0)) / torch.pi for x, y in states]
    assert any(note.startswith("layer_drop was left out: expected layers with their own keys") for note in report.notes)
    assert report.layers["angular_distance"] == pytest.approx([float(angle) for angle in angles], abs=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_use_the_keys_of_others_are_repeated(kind):
    """The second time, too, they use the same keys; a layer that hands on its keys does so the last time."""
    for start, end in ((6, 8), (1, 2), (2, 5)):
        model, order = model_of(kind), [*range(end), *range(start, 8)]
        with torch.no_grad():
            expected = with_block(model, start, end)(input_ids=IDS, use_cache=False)[0]
        with arranged(model, lambda stack, order=order: order, None):
            assert torch.equal(output(model), expected)
            assert torch.equal(generated(model), generated(model, use_cache=False))
