"""Plans for other engines: budgets, fused matrices, and what is refused."""

import re

import pytest
from torch import nn

from hf_cod import LayerAllocation, find_decoder_layers, plan_bits
from hf_cod.compression.export.plan import matrices_of, plan_as_given, plan_by_scores, units_of
from hf_cod.compression.export.targets import TARGETS
from tests.compression.export.models import llama, scores
from tests.tiny_models import build

ENGINE = TARGETS["compressed-tensors"]


@pytest.fixture
def stack():
    return find_decoder_layers(llama())


def made(stack, bits, values=None, engine=ENGINE, group=None):
    matrices = matrices_of(stack, engine, group, engine.grouped)
    return plan_by_scores(stack, engine, matrices, bits, values)


def by_hand(shape, width, group, scale=32):
    return shape[0] * shape[1] * width + shape[0] * shape[1] // group * scale


@pytest.mark.parametrize("bits", [3.5, 3.7, 3.9, 4.2, 4.5, 6.3])
def test_the_budget_is_met_within_one_unit(stack, bits):
    plan = made(stack, bits, scores(stack.model, [1.0, 3.0, 2.0]))
    modules = dict(stack.model.named_modules())
    assert plan.group == 64 and len(plan.widths) == 21
    stored = {name: by_hand(modules[name].weight.shape, width, 64) for name, width in plan.widths.items()}
    assert plan.stored == stored
    weights = sum(modules[name].weight.numel() for name in stored)
    assert plan.bits() == sum(stored.values()) / weights
    largest = 2 * 64 * 128  # gate and up
    assert bits - largest / weights < plan.bits() <= bits + 0.02
    low, high = min(plan.widths.values()), max(plan.widths.values())
    assert high - low <= 1
    for name, width in plan.widths.items():
        if width == high and plan.layers[name] != 1 and high > low:
            assert all(w == high for n, w in plan.widths.items() if plan.layers[n] == 1), "highest score first"


def test_fused_matrices_share_a_width(stack):
    for bits in (3.55, 3.6, 3.65, 3.75, 3.8):
        plan = made(stack, bits)
        for index in range(3):
            widths = {n.rpartition(".")[2]: w for n, w in plan.widths.items() if plan.layers[n] == index}
            assert widths["q_proj"] == widths["k_proj"] == widths["v_proj"] and widths["gate_proj"] == widths["up_proj"]
    assert len(units_of([f"layers.0.mlp.experts.{i}.w{j}" for i in range(3) for j in (1, 2, 3)], True)) == 1
    assert len(units_of(["a.q_proj", "a.k_proj"], False)) == 2


def test_layers_as_given(stack):
    matrices = matrices_of(stack, ENGINE, None, True)
    sizes = [stack.count_weights(i) for i in range(3)]
    given = LayerAllocation("bits", 3.5, [4.0, 3.0, 3.5], sizes, "owl", model="llama", sizes=sizes)
    plan = plan_as_given(stack, ENGINE, matrices, given)
    assert {plan.widths[n] for n in plan.widths if plan.layers[n] == 0} == {4}
    assert {plan.widths[n] for n in plan.widths if plan.layers[n] == 1} == {3}
    mixed = {n: w for n, w in plan.widths.items() if plan.layers[n] == 2}
    share = sum(plan.sizes[n][0] * plan.sizes[n][1] for n, w in mixed.items() if w == 4) / sizes[2]
    assert 0.2 < share <= 0.5


def test_matrices_as_given(stack):
    """The plan of our own format, made so that each layer has one width."""
    given = plan_bits(stack, 3, block=32)
    plan = plan_as_given(stack, ENGINE, matrices_of(stack, ENGINE, None, True), given)
    assert plan.widths == given.bits


def of_layers(stack, values, **more):
    return LayerAllocation("bits", 3.5, values, [1] * len(values), "owl", **more)


def test_bad_plans(stack):
    matrices = matrices_of(stack, ENGINE, None, True)
    three, name = plan_bits(stack, 3, block=32), "model.layers.1.self_attn.k_proj"
    three.bits[name] = 4
    other = build("llama", 2)
    cases = {
        "plan: expected one width for matrices that compressed-tensors fuses, got q_proj 3, k_proj 4, v_proj 3 in "
        "model.layers.1.self_attn": three,
        "plan: expected matrices of the model, got layers.9.x: unknown": type(three)({"layers.9.x": 3}, {}, 3.0, {}),
        "plan: expected widths of compressed-tensors (2, 3, 4, 5, 6, 7, 8 bits), got 9 for layer 1": of_layers(
            stack, [3.0, 9.0, 3.0]
        ),
        "plan: expected widths of compressed-tensors (2, 3, 4, 5, 6, 7, 8 bits), got 1.5 for layer 0": of_layers(
            stack, [1.5, 3.0, 3.0]
        ),
        "plan: expected bits of 3 layers, got 2 (m)": of_layers(stack, [3.0, 4.0], model="m"),
        "plan: expected those of a model with 36864 weights in layer 0, got one with 7 (m)": of_layers(
            stack, [3.0] * 3, model="m", sizes=[7, 7, 7]
        ),
        "plan: expected bits of each layer, got sparsity": LayerAllocation("sparsity", 0.5, [0.5] * 3, [1] * 3, "owl"),
    }
    for said, plan in cases.items():
        with pytest.raises(ValueError, match=f"^{re.escape(said)}"):
            plan_as_given(stack, ENGINE, matrices, plan)
    with pytest.raises(ValueError, match=r"^plan: expected widths of llama\.cpp \(2, 3, 4, 5, 6, 8 bits\), got 7 for"):
        engine = TARGETS["llama.cpp"]
        plan_as_given(stack, engine, matrices_of(stack, engine, None, False), of_layers(stack, [7.0] * 3))
    with pytest.raises(ValueError, match=r"^scores: expected those of a model with 3 layers|^scores: expected"):
        made(stack, 3.6, scores(other, [1.0, 2.0]))


def test_bad_budgets_and_groups(stack):
    with pytest.raises(ValueError, match=r"^bits: expected 2\.5 to 8\.5 stored bits a weight in the format of comp.*9"):
        made(stack, 9)
    with pytest.raises(ValueError, match=r"^bits: expected 4\.5 to 8\.5 stored bits .* of llama\.cpp.*, got 3\.6$"):
        made(stack, 3.6, engine=TARGETS["llama.cpp"])
    with pytest.raises(ValueError, match=r"^group_size: expected none for llama\.cpp, whose types have their own"):
        made(stack, 5, engine=TARGETS["llama.cpp"], group=32)
    with pytest.raises(ValueError, match=r"^model: expected matrices that exl3 can quantize, got none: its shape"):
        made(stack, 4, engine=TARGETS["exl3"])
    with pytest.raises(ValueError, match=r"^model: .* none: a Conv1D, which is not a Linear$"):
        made(find_decoder_layers(build("gpt2", 2)), 4)


def test_what_cannot_be_quantized_is_named(stack):
    stack[1].mlp.down_proj = nn.Linear(120, 64, bias=False)
    assert made(stack, 4).left == {"model.layers.1.mlp.down_proj": "its rows of 120 are no multiple of 64"}
    assert made(stack, 4.4, group=32).group == 32
