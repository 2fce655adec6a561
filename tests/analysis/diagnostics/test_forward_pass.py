import itertools

import pytest
import torch
from accelerate import disk_offload
from transformers import CONFIG_MAPPING, AutoModel

from hf_cod.analysis.diagnostics.forward_pass import measure_forward
from tests import references
from tests.tiny_models import FAMILIES, batch_for, build


def check_formulas(model, batch, token="last", tolerance=1e-6):
    """All forward measures of one batch against the formulas."""
    found = measure_forward(model, [batch], token=token)
    mask = batch.get("attention_mask")
    states = references.hidden_states(model, batch)
    torch.testing.assert_close(
        found.angular_distance(), references.angular_matrix(states, mask, token), atol=tolerance, rtol=0, equal_nan=True
    )
    expected = torch.tensor(references.block_influence(states, mask), dtype=torch.float64)
    torch.testing.assert_close(found.influence.double().mean(0), expected, atol=tolerance, rtol=0)
    variance = found.output_variance()
    for i, (x, y) in enumerate(itertools.pairwise(states)):
        tokens = references.real_tokens(y, mask)
        update = references.real_tokens(y - x, mask)
        assert variance["variance"][i] == pytest.approx(float(tokens.var(correction=0)), rel=tolerance)
        assert variance["mean"][i] == pytest.approx(float(tokens.mean()), abs=tolerance)
        assert variance["max_abs"][i] == pytest.approx(float(tokens.abs().max()), rel=tolerance)
        share = float(update.var(correction=0) / tokens.var(correction=0))
        assert variance["added_share"][i] == pytest.approx(share, rel=tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_against_the_formulas(family):
    model = build(family)
    check_formulas(model, batch_for(model))


@pytest.mark.parametrize("token", ["last", "first", "all"])
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_padding_is_ignored(family, padding, token):
    model = build(family)
    check_formulas(model, batch_for(model, padding), token)


def test_bfloat16():
    model = build("llama", dtype=torch.bfloat16)
    check_formulas(model, batch_for(model, "right"))


def test_one_layer():
    model = build("llama", layers=1)
    check_formulas(model, batch_for(model))


def test_batches_of_unequal_size_count_by_sample():
    model = build("llama")
    batch = batch_for(model)
    parts = [{k: v[:1] for k, v in batch.items()}, {k: v[1:] for k, v in batch.items()}]
    whole, split = measure_forward(model, [batch]), measure_forward(model, parts)
    torch.testing.assert_close(whole.angular_distance(), split.angular_distance(), equal_nan=True, atol=1e-7, rtol=0)
    torch.testing.assert_close(whole.outputs, split.outputs, atol=1e-5, rtol=1e-6)


def test_the_last_state_is_in_front_of_the_final_norm():
    model = build("llama")
    batch = batch_for(model)
    with torch.no_grad():
        shown = model(**batch, output_hidden_states=True).hidden_states[-1]
    expected = float(references.hidden_states(model, batch)[-1].var(correction=0))
    assert measure_forward(model, [batch]).output_variance()["variance"][-1] == pytest.approx(expected, rel=1e-6)
    assert abs(float(shown.var(correction=0)) - expected) > 1e-3, "transformers' own last state is another one"


def test_offloaded_to_disk(tmp_path):
    model = build("llama")
    batch = batch_for(model)
    expected = measure_forward(model, [batch])
    disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    assert any(p.device.type == "meta" for p in model.parameters())
    found = measure_forward(model, [batch])
    torch.testing.assert_close(found.distances, expected.distances, atol=0, rtol=0)


def test_a_model_without_weights_is_refused():
    with torch.device("meta"):
        model = build("llama")
    with pytest.raises(ValueError, match="got a model on the meta device"):
        measure_forward(model, [batch_for(model)])


def test_broken_activations_name_the_first_layer():
    model = build("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] = float("nan")
    for metrics in (["angular_distance"], ["output_variance"]):
        with pytest.raises(ValueError, match="first in the output of layer 2, batch 0"):
            measure_forward(model, [batch_for(model)], metrics)
    assert not any(layer._forward_hooks for layer in model.model.layers)


def test_the_model_is_left_as_it_was():
    model = build("llama").train()
    model.model.layers[1].eval()
    modes = [m.training for m in model.modules()]
    measure_forward(model, [batch_for(model)])
    assert [m.training for m in model.modules()] == modes
    assert model.config.use_cache is True
    assert not any(layer._forward_hooks for layer in model.model.layers)


def test_bad_settings():
    model = build("llama")
    with pytest.raises(ValueError, match="token: expected 'last', 'first' or 'all', got 'middle'"):
        measure_forward(model, [batch_for(model)], token="middle")
    with pytest.raises(ValueError, match="metrics: expected some of"):
        measure_forward(model, [batch_for(model)], ["speed"])


def test_hidden_states_with_tokens_first_are_refused():
    config = CONFIG_MAPPING["xlnet"](vocab_size=99, d_model=32, n_layer=2, n_head=4, d_inner=48)
    model = AutoModel.from_config(config).eval()
    with pytest.raises(ValueError, match="of 3 samples, got"):
        measure_forward(model, [batch_for(model)])
