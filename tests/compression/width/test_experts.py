"""Channels of experts: fewer equal zeroed ones, each expert chooses its own, and a reload is equal."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_cod import WidthPlan, find_decoder_layers, narrow, plan_width
from hf_cod.layers.unit_discovery import find_all_units
from hf_cod.layers.units import EXPERTS
from tests.tiny_models import MIXTURE_TYPES, batch_for, build_mixture, outputs

FAST = ("mixtral", "qwen2_moe", "gpt_oss", "llama4_text", "dbrx", "jetmoe", "deepseek_v3")


def experts_of(model):
    """(layer, units) of each layer with experts."""
    stack = find_decoder_layers(model)
    return [(i, layer[EXPERTS]) for i, layer in enumerate(find_all_units(stack)) if layer[EXPERTS]]


def zeroed(model, plan):
    """A copy of the naive kind: the columns of the channels with the least norm are zero."""
    for index, units in experts_of(model):
        for expert in range(units.experts):
            W = units.weights_of(model, expert)
            energy = sum(
                torch.stack([R[(owners == c)].square().sum() for c in range(units.count)])
                for R, owners in ((W[name], owners) for name, owners in units.readers.items())
            )
            energy = energy + W[units.writer].square().sum(0)
            gone = energy.argsort(descending=True, stable=True)[plan.expert_channels[index] :]
            changed = W[units.writer].clone()
            changed[:, gone] = 0
            units.matrix(model, units.writer).write(expert, changed)
    return model


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind in FAST else pytest.mark.families) for kind in MIXTURE_TYPES]
)
def test_fewer_channels_equal_zeroed_ones_after_a_reload(kind, tmp_path):
    model, intact = build_mixture(kind), build_mixture(kind)
    found = experts_of(model)
    experts = [None] * 4
    for index, units in found:
        experts[index] = units.count // 2 // 8 * 8
    plan = WidthPlan(0.7, [None] * 4, [None] * 4, "mine", expert_channels=experts)
    report = narrow(model, plan, "magnitude", "none")
    torch.testing.assert_close(outputs(model), outputs(zeroed(intact, plan)), rtol=1e-4, atol=1e-4)
    lost = sum(p.numel() for p in intact.parameters()) - sum(p.numel() for p in model.parameters())
    assert lost >= sum(units.weights * (units.count - experts[index]) for index, units in found) > 0
    assert report.results["expert_channels"] == experts
    # A number of the config also counts the channels of a shared expert, or is in a config inside.
    assert report.results["stock"] == (kind not in ("dbrx", "deepseek_v3", "glm4_moe", "llama4_text"))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(outputs(again), outputs(model))
    batch = batch_for(model)["input_ids"]
    assert torch.equal(again.generate(batch, max_new_tokens=3), model.generate(batch, max_new_tokens=3))


@pytest.mark.parametrize("method, compensation", [("fluctuation", "least_squares"), ("taylor", "bias")])
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_each_expert_chooses_by_its_own_tokens(kind, method, compensation, tmp_path):
    model = build_mixture(kind)
    batch = batch_for(model)
    plan = plan_width(model, 0.7, 8)
    assert all(number % 8 == 0 and number < 96 for number in plan.expert_channels)
    writer = experts_of(model)[0][1]
    before = writer.matrix(model, writer.writer).weights().clone()
    report = narrow(model, plan, method, compensation, batches=[batch], journal=tmp_path)
    assert abs(report.results["parameter_share"] - 0.7) < 8 / 96 / 2
    assert report.results["stock"] == (compensation != "bias" or kind == "gpt_oss")  # which has biases
    assert all(0 < error < 1 for error in report.layers["error"])
    if compensation == "bias":  # the kept columns are those of the intact model
        after = writer.matrix(model, writer.writer).weights()
        kept = [
            {c for c in range(96) if (before[e][:, c, None] == after[e]).all(0).any()} for e in range(writer.experts)
        ]
        assert all(len(one) == after.shape[2] for one in kept)
        assert len({frozenset(one) for one in kept}) > 1
    again = build_mixture(kind)
    narrow(again, plan, method, compensation, batches=[batch], journal=tmp_path)
    assert torch.equal(outputs(again), outputs(model))


def test_numbers_that_kernels_do_not_take_are_refused():
    model = build_mixture("mixtral")
    with pytest.raises(ValueError, match=r"expert_channels: expected a multiple of 8, .* in 8\.\.96 in layer 0"):
        narrow(model, WidthPlan(0.7, [None] * 4, [None] * 4, "mine", expert_channels=[12] * 4), "magnitude", "none")
