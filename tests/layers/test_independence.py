import math

import pytest
import torch

from examples.tiny_architectures import build as build_type
from hf_cod import diagnose, factorize, find_decoder_layers, narrow, plan_ranks, prune, quantize, skip
from hf_cod.layers.independence import check_independent
from tests.tiny_models import FAMILIES, batch_for, build

REASON = r"expected layers that depend on earlier ones only by what the layer before returns, got .*whose layer 3 does"


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_of_common_families_run_alone(family):
    model = build(family)
    check_independent(find_decoder_layers(model), "layers")
    check_independent(find_decoder_layers(model), "layers", [batch_for(model)])


def test_layers_that_use_states_of_several_earlier_ones_are_refused():
    """Inkling 2 hands the states before every other layer to all later ones."""
    model, batches = build_type("inkling2_text"), [{"input_ids": torch.arange(3, 11)[None]}]
    with pytest.raises(ValueError, match=rf"^prune: {REASON}"):
        prune(model, 0.5, batches=batches)
    with pytest.raises(ValueError, match=rf"^layer_drop: {REASON}"):
        diagnose(model, batches=batches, metrics=["layer_drop"])
    report = diagnose(model, batches=batches, metrics=["angular_distance"])
    assert report.n_layers == 4


@pytest.mark.parametrize(
    "change",
    [
        lambda model, batches: prune(model, 0.5, "sparsegpt", batches=batches),
        lambda model, batches: quantize(model, bits=4, batches=batches),
        lambda model, batches: factorize(model, 0.9, "whitened", batches=batches),
        lambda model, batches: factorize(model, 0.9, "oats", batches=batches),
        lambda model, batches: plan_ranks(model, 0.9, "spectrum", batches=batches),
        lambda model, batches: narrow(model, 0.9, batches=batches),
    ],
    ids=["sparsegpt", "quantize", "whitened", "oats", "plan_ranks", "narrow"],
)
def test_every_method_that_runs_layers_one_by_one_refuses_them(change):
    model, batches = build_type("inkling2_text"), [{"input_ids": torch.arange(3, 11)[None]}]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=REASON):
        change(model, batches)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_layers_that_share_keys_and_values_are_refused():
    model = build("llama")
    model.config.num_kv_shared_layers = 1
    with pytest.raises(ValueError, match=r"^prune: expected layers with their own keys and values"):
        check_independent(find_decoder_layers(model), "prune")


def test_a_second_state_that_layers_hand_on_is_that_of_the_layer_before():
    """The router of Zaya mixes its state with that of the layer before."""
    model, batch = build_type("zaya"), {"input_ids": torch.arange(3, 11)[None]}
    batch["labels"] = batch["input_ids"]
    report = diagnose(model, batches=[batch], metrics=["layer_drop"])
    for layer, perplexity in enumerate(report.results["layer_drop"]["without"]):
        with torch.no_grad(), skip(model, layer):
            assert math.log(perplexity) == pytest.approx(float(model(**batch).loss), abs=1e-5), layer
