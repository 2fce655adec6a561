import copy

import pytest
import torch

from examples.tiny_architectures import build as build_type
from hf_cod import find_decoder_layers, prune, skip
from hf_cod.layers.partial_forward import run_layer
from tests.layers.removal.test_drop import two_towers
from tests.tiny_models import FAMILIES, batch_for, build


@torch.no_grad()
def hidden_states(model, batch):
    return model(**batch, output_hidden_states=True).hidden_states


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_complete_inside_of_skip_and_after_it(family):
    """Whether hidden states are first asked for inside of the block or before it."""
    model = build(family)
    batch, untouched = batch_for(model), copy.deepcopy(model)
    expected = hidden_states(untouched, batch)
    for _ in range(2):
        with skip(model, 1):
            assert len(hidden_states(model, batch)) == len(expected) - 1
        found = hidden_states(model, batch)
        assert len(found) == len(expected)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "vit"])
def test_hidden_states_are_complete_after_a_partial_forward(family):
    model = build(family)
    batch, untouched = batch_for(model), copy.deepcopy(model)
    run_layer(find_decoder_layers(model), 0, {**batch, "output_hidden_states": True}, None)
    assert len(hidden_states(model, batch)) == len(hidden_states(untouched, batch))


def test_hidden_states_are_complete_after_pruning_a_model_that_always_returns_them():
    model = build("llama")
    model.config.output_hidden_states = True
    batch = batch_for(model)
    prune(model, 0.5, batches=[batch])
    with torch.no_grad():
        assert len(model(**batch).hidden_states) == len(find_decoder_layers(model)) + 1


def test_hooks_of_others_are_kept():
    model = build("llama")
    calls = []
    with skip(model, 1):
        handle = find_decoder_layers(model)[0].register_forward_hook(lambda *_: calls.append(1))
        hidden_states(model, batch_for(model))
    hidden_states(model, batch_for(model))
    handle.remove()
    assert len(calls) == 2


def test_a_tower_that_hands_on_hidden_states_runs_in_parts():
    """LLaVA reads the hidden state of a layer of its vision tower, also while only another layer runs."""
    model = two_towers()
    batch = {"input_ids": torch.tensor([[3, 98, 98, 98, 98, 5]]), "pixel_values": torch.rand(1, 3, 16, 16)}
    model.config.image_token_id = 98
    tower = find_decoder_layers(model, "vision")
    expected = model(**batch).logits
    state = None
    for layer in range(len(tower)):
        state = run_layer(tower, layer, batch, state)
    torch.testing.assert_close(model(**batch).logits, expected)
    whole = []
    handle = tower[-1].register_forward_hook(lambda module, args, output: whole.append(output))
    model(**batch)
    handle.remove()
    last = whole[0][0] if isinstance(whole[0], tuple) else whole[0]
    torch.testing.assert_close(state[0], last)


@torch.no_grad()
def test_a_trunk_that_takes_embeddings_runs_in_parts():
    """The base of DINOv3 is its encoder."""
    model = build_type("vision/dinov3_vit")
    batch = {"pixel_values": torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
    stack, state = find_decoder_layers(model), None
    expected = hidden_states(model, batch)
    for layer in range(len(stack)):
        state = run_layer(stack, layer, batch, state)
        if layer < len(stack) - 1:
            torch.testing.assert_close(state[0], expected[layer + 1])
