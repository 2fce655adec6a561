"""Which matrices get four bits first in a mixture: by layer, by expert, within an allocation."""

import copy

import pytest

from hf_cod import ExpertScores, LayerScores, OwlBnbConfig, find_decoder_layers, plan_bits, quantize, score_experts
from hf_cod.compression.quantization.plan import as_allocation, plan_by
from tests.compression.quantization.matrices import llama
from tests.compression.quantization.test_experts import mixture
from tests.layers.test_expert_routing import with_lists
from tests.tiny_models import batch_for

EXPERTS = [f"model.layers.{index}.mlp.experts" for index in range(4)]


def scores(stack, values):
    """Scores of experts of a mixture, one row of values for each layer."""
    sets = [experts for index in range(len(stack)) for experts in stack.expert_sets(index)]
    names = [experts.name for experts in sets]
    return ExpertScores(
        "tiny",
        "made up",
        dict(zip(names, values, strict=True)),
        {name: index for index, name in enumerate(names)},
        {experts.name: [1] * experts.count for experts in sets},
        {experts.name: experts.sizes() for experts in sets},
    )


def four(plan):
    """(layer, expert) of those with four bits in all of their matrices."""
    found = set()
    for index, name in enumerate(EXPERTS):
        up, down = (plan.widths(f"{name}.{key}") for key in ("gate_up_proj", "down_proj"))
        up, down = (widths * (4 // len(widths)) for widths in (up, down))
        found |= {(index, e) for e in range(4) if up[e] == down[e] == 4}
    return found


RANKED = [[0.0, 1.0, 5.0, 0.0], [9.0, 0.0, 0.0, 2.0], [0.0, 0.0, 3.0, 0.0], [8.0, 7.0, 0.0, 0.0]]


def test_the_experts_with_the_highest_scores_of_all_layers_get_four_bits():
    stack = find_decoder_layers(mixture())
    plan = plan_bits(stack, 3.75, block=32, expert_scores=scores(stack, RANKED))
    assert four(plan) == {(1, 0), (3, 0), (3, 1), (0, 2), (2, 2)}
    assert {plan.bits[name] for name in plan.bits if "self_attn" in name} == {4}, "what all tokens enter comes first"
    assert plan.bits[f"{EXPERTS[3]}.down_proj"] == "4433"
    assert 3.73 < plan.stored <= 3.75


def test_without_scores_of_experts_whole_layers_come_first():
    stack = find_decoder_layers(mixture())
    given = LayerScores("tiny", "made up", [0.0, 3.0, 1.0, 2.0], [stack.count_weights(i) for i in range(4)])
    plan = plan_bits(stack, 3.75, scores=given, block=32)
    assert four(plan) == {(1, e) for e in range(4)} | {(3, e) for e in range(3)}
    assert plan.bits[f"{EXPERTS[1]}.down_proj"] == 4 and plan.bits["model.layers.0.self_attn.q_proj"] == 3


def test_an_allocation_keeps_the_choice_of_experts():
    """What the command writes: the mean of each layer; within a layer the scores decide again."""
    model = mixture()
    stack = find_decoder_layers(model)
    given = scores(stack, RANKED)
    plan = plan_bits(stack, 3.7, block=32, expert_scores=given)
    config = OwlBnbConfig(block=32)
    allocation = as_allocation(stack, plan, config, "angular")
    assert 3 < allocation.values[1] < 4
    config = OwlBnbConfig(block=32, allocation=allocation, expert_scores=given)
    assert plan_by(stack, config).bits == plan.bits
    report = quantize(model, config)
    assert report.results["module_bits"] == plan.bits and report.layers["four"][1] == 4 + 2
    kept = model.config.quantization_config
    assert kept.expert_scores is None and kept.modules == plan.bits and kept.score == "angular"
    assert report.settings["expert_score"] == "made up"


def test_measured_scores_and_their_file(tmp_path):
    model = mixture()
    found = score_experts(model, method="frequency", batches=[batch_for(model)])
    found.save(tmp_path / "expert_scores.json")
    one, two = copy.deepcopy(model), copy.deepcopy(model)
    options = {"bits": 3.6, "block": 32}
    first = quantize(one, OwlBnbConfig(expert_scores=found, **options))
    second = quantize(two, OwlBnbConfig(expert_scores=str(tmp_path / "expert_scores.json"), **options))
    assert first.results["module_bits"] == second.results["module_bits"] and first.settings["score"] == "frequency"
    assert not any("no scores" in note for note in first.notes)
    for values, name in zip(found.values.values(), EXPERTS, strict=True):
        widths = first.results["module_bits"][f"{name}.down_proj"]
        chosen = [v for v, w in zip(values, str(widths), strict=False) if w == "4"]
        assert not chosen or min(chosen) >= max(set(values) - {*chosen}, default=0) or isinstance(widths, int)


def test_experts_in_modules_of_their_own():
    stack = find_decoder_layers(with_lists())
    given = scores(stack, [[0.0, 1.0, 0.0], [0.0, 0.0, 2.0]])
    ends = [plan_bits(stack, bits).stored for bits in (3, 4)]
    plan = plan_bits(stack, ends[0] + 0.9 * (ends[1] - ends[0]), expert_scores=given)
    chosen = {name for name, bits in plan.bits.items() if ".experts." in name and bits == 4}
    assert {f"model.layers.{i}.mlp.experts.{e}.{m}" for i, e in ((1, 2), (0, 1)) for m in (0, 2)} <= chosen
    assert {bits for name, bits in plan.bits.items() if "self_attn" in name} == {4}


def test_scores_of_other_experts_are_refused():
    stack = find_decoder_layers(mixture())
    given = scores(stack, RANKED)
    with pytest.raises(ValueError, match=r"expert_scores: expected no experts in model.layers.0.mlp.experts"):
        plan_bits(find_decoder_layers(llama()), 3.5, expert_scores=given)
    with pytest.raises(ValueError, match="expert_scores: expected none with bits 3, which uses no scores"):
        OwlBnbConfig(bits=3, expert_scores=given)
