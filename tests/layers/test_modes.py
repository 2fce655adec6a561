"""What a model's modes and flags were comes back, module by module, where a measurement or a training fails midway."""

import pytest
import torch

from hf_cod import collect_statistics, diagnose, prune, recover
from tests.tiny_models import batch_for, build


def mixed_model():
    """In train mode but for one layer, with another one frozen, and the KV cache on."""
    model = build("llama").train()
    model.model.layers[1].eval()
    model.model.layers[2].requires_grad_(False)
    model.config.use_cache = True
    return model


def state_of(model):
    modes = {name: module.training for name, module in model.named_modules()}
    return modes, {name: p.requires_grad for name, p in model.named_parameters()}, model.config.use_cache


def fail_to_measure(measure):
    def fail(model):
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight.fill_(torch.inf)
        measure(model, batches=[batch_for(model)])

    return fail


def fail_to_recover(model):
    batch = batch_for(model)
    prune(model, 0.6, "wanda", batches=[batch])
    recover(model, [batch], 30, learning_rate=1e30)


@pytest.mark.parametrize(
    "fail",
    [fail_to_measure(collect_statistics), fail_to_measure(diagnose), fail_to_recover],
    ids=["sums", "diagnose", "recover"],
)
def test_modes_and_flags_come_back_from_a_failure(fail):
    model = mixed_model()
    before = state_of(model)
    with pytest.raises(ValueError, match="finite"):
        fail(model)
    assert state_of(model) == before


def test_modes_and_flags_come_back_from_a_success():
    model = mixed_model()
    before = state_of(model)
    diagnose(model, batches=[batch_for(model)])
    assert state_of(model) == before
