"""What a model's modes and flags were comes back, module by module, where a measurement or a training fails midway."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from examples.tiny_architectures import build as build_type
from examples.tiny_architectures import tiny_config
from hf_cod import collect_statistics, diagnose, drop, plan_bits, plan_width, prune, recover
from hf_cod.layers.direct_use import direct_use
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


def test_probes_leave_the_modules_that_a_model_replaces_on_a_few_tokens():
    """BigBird's sparse attention requires many tokens; on the few of a probe it is replaced by full attention."""
    config = tiny_config("big_bird")
    config.max_position_embeddings = 256
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    batch = {"input_ids": torch.randint(5, 80, (1, 128), generator=torch.Generator().manual_seed(0))}
    before = {name: id(module) for name, module in model.named_modules()}
    with torch.no_grad():
        expected = model(**batch).logits
    diagnose(model, batches=[batch], show_progress=False)
    plan_bits(model, 4.0)
    plan_width(model, 0.9)
    with pytest.raises(ValueError, match="can describe"):
        drop(model, 1)
    assert {name: id(module) for name, module in model.named_modules()} == before
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, expected)


def test_a_probe_in_training_leaves_moving_averages():
    model = build_type("encoder/ibert")
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for module in model.modules():
        if hasattr(module, "quant_mode"):
            module.quant_mode = True
    direct_use(model)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_a_mixture_that_trains_with_a_balancing_loss_is_measured_without_it():
    """The loss needs the logits of all routers, and some measurements run single layers."""
    model = build("qwen2_moe")
    expected = diagnose(model, batches=[batch_for(model)])
    model.config.output_router_logits = True
    found = diagnose(model, batches=[batch_for(model)])
    assert model.config.output_router_logits and found.layers == expected.layers
