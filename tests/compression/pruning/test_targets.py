"""Sparsities of single experts: the plan, the zeros that it promises, and what cannot be."""

import copy
import re
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from hf_cod import (
    LayerAllocation,
    allocate,
    collect_statistics,
    find_decoder_layers,
    prune,
    score_experts,
    score_layers,
)
from hf_cod.compression.pruning.methods import METHODS
from hf_cod.layers.finished_layers import FinishedLayers
from tests import references
from tests.compression.experts.test_merging import listed
from tests.fresh_processes import run_fresh
from tests.tiny_models import MIXTURE_TYPES, build, build_mixture, outputs, two_batches, unmapped_outputs

FAST = ("mixtral", "gpt_oss", "dbrx", "deepseek_v3")
KINDS = [pytest.param(kind, marks=[] if kind in FAST else pytest.mark.families) for kind in MIXTURE_TYPES]


def scored(model, method="frequency", layers="weight_norm"):
    batches = two_batches(model)
    return score_layers(model, method=layers, batches=batches), score_experts(model, method=method, batches=batches)


def planned(model, budget=0.5, spread=0.2, **options):
    scores, experts = scored(model)
    return allocate(scores, "sparsity", budget, spread, expert_scores=experts, **options)


def promised(model, plan):
    """(name, expert or None) -> (W, its sparsity by the plan), by the structure of the model alone."""
    stack, found = find_decoder_layers(model), {}
    for index, common in enumerate(plan.common):
        for name, W in stack.matrices(index):
            own = next((values for key, values in plan.experts.items() if f"{name}.".startswith(f"{key}.")), None)
            listed = name.partition(".expert_")[2].partition(".")[0]
            if own is not None and W.dim() == 3:
                found |= {(name, expert): (W[expert], value) for expert, value in enumerate(own)}
            else:  # JetMoe has its router among its experts
                found[name, None] = W, own[int(listed)] if listed else common
    return found


def linear(scores, weights, S, lam):
    """c - 2 lam u, cut at S -+ lam, with the level c for which the weighted mean is S."""
    u = [(s - min(scores)) / (max(scores) - min(scores)) for s in scores]
    low, high = -2.0, 2.0
    for _ in range(100):
        c = (low + high) / 2
        x = [min(max(c - 2 * lam * v, S - lam), S + lam) for v in u]
        mean = sum(v * w for v, w in zip(x, weights, strict=True)) / sum(weights)
        low, high = (c, high) if mean < S else (low, c)
    return x


@pytest.mark.parametrize("kind", ["mixtral", "jetmoe", "deepseek_v3"])
def test_experts_are_compared_over_all_layers(kind, tmp_path):
    """JetMoe has two sets of experts in a layer, of different sizes; the first layers of DeepSeek have none."""
    model = build_mixture(kind)
    scores, experts = scored(model)
    plan = allocate(scores, "sparsity", 0.6, 0.1, expert_scores=experts)
    weights = [size for sizes in experts.parameters.values() for size in sizes]
    expected = linear([v for own in experts.values.values() for v in own], weights, 0.6, 0.1)
    assert [v for own in plan.experts.values() for v in own] == pytest.approx(expected)
    left = list(scores.parameters)
    for name, layer in experts.layers.items():
        left[layer] -= sum(experts.parameters[name])
    assert plan.common == pytest.approx(linear(scores.values, left, 0.6, 0.1))
    parts = promised(model, plan)
    for index in range(4):
        own = [(W.numel(), x) for (name, _), (W, x) in parts.items() if f".{index}." in name]
        assert plan.values[index] == pytest.approx(sum(n * x for n, x in own) / sum(n for n, _ in own))
    assert plan.mean == pytest.approx(0.6) and plan.method == "weight_norm, experts by frequency"
    plan.save(tmp_path / "plan.json")
    assert LayerAllocation.load(tmp_path / "plan.json") == plan


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_each_expert_has_the_zeros_that_are_promised(kind, method, tmp_path):
    model = build_mixture(kind)
    plan = planned(model)
    report = prune(model, plan, method, batches=two_batches(model))
    for (name, _), (W, sparsity) in promised(model, plan).items():
        # SparseGPT rounds the number of zeros in each block of 128 columns.
        slack = 0.5 * -(-W.shape[1] // 128) if method == "sparsegpt" else 0.5
        assert abs(int((W == 0).sum()) - W.numel() * sparsity) <= slack + 1e-6, name
    assert report.results["sparsity"] == pytest.approx(0.5, abs=2e-3)
    for name, values in plan.experts.items():
        assert report.results["expert_sparsity"][name] == pytest.approx(values, abs=0.01)
    assert max(map(max, plan.experts.values())) - min(map(min, plan.experts.values())) > 0.3
    assert report.layers["target"] == plan.values
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(unmapped_outputs(again), unmapped_outputs(model))


def test_the_zeros_are_those_of_the_formula():
    model = build("mixtral", layers=2)
    plan, statistics = planned(model), collect_statistics(model, two_batches(model))
    intact = copy.deepcopy(model)
    prune(model, plan, "wanda", statistics=statistics)
    for (name, expert), (W, sparsity) in promised(model, plan).items():
        before = promised(intact, plan)[name, expert][0]
        squares = statistics.of(name) if expert is None else statistics.of(name, expert)
        assert torch.equal(W == 0, references.wanda_mask(before, squares.sqrt().float(), sparsity)), (name, expert)


def test_experts_that_are_modules_in_a_list():
    model = listed()
    plan = planned(model)
    report = prune(model, plan, "wanda", batches=two_batches(model))
    assert {*plan.experts} == {f"model.layers.{index}.mlp.experts" for index in range(2)}
    for (name, _), (W, sparsity) in promised(model, plan).items():
        assert abs(int((W == 0).sum()) - W.numel() * sparsity) <= 0.5 + 1e-6, name
    assert report.results["sparsity"] == pytest.approx(0.5, abs=2e-3)


def test_patterns_of_experts():
    model = build_mixture("mixtral", hidden_size=32, intermediate_size=64)
    plan = planned(model, group=8)
    report = prune(model, plan, "magnitude")
    assert report.results["expert_sparsity"] == {n: pytest.approx(own) for n, own in plan.experts.items()}
    assert len({value for own in plan.experts.values() for value in own}) > 1
    assert {value * 8 % 1 for own in (plan.common, *plan.experts.values()) for value in own} == {0}
    assert report.results["sparsity"] == pytest.approx(0.5, abs=1 / 16)
    with pytest.raises(ValueError, match=r"^granularity: expected layer, got expert; pattern\(value\)"):
        _ = plan.patterns


def test_one_expert_and_equal_scores_and_no_tokens():
    alone = build_mixture("mixtral", num_local_experts=1, num_experts_per_tok=1)
    assert {round(v, 9) for own in planned(alone).experts.values() for v in own} == {0.5}
    model = build_mixture("mixtral")
    scores, experts = scored(model)
    alike = replace(experts, values={name: [1.0] * 4 for name in experts.values})
    plan = allocate(scores, "sparsity", 0.5, expert_scores=alike)
    assert {v for own in plan.experts.values() for v in own} == {0.5}
    model = build("mixtral", layers=1, num_local_experts=12, num_experts_per_tok=1)
    few = [{"input_ids": torch.tensor([[5, 6, 7]])}]
    experts = score_experts(model, method="reap", batches=few)
    plan = allocate(score_layers(model, method="uniform"), "sparsity", 0.5, 0.3, expert_scores=experts)
    (name,), (own,) = experts.unseen, plan.experts.values()
    assert {own[e] for e in experts.unseen[name]} == {max(own)} and len(experts.unseen[name]) >= 9
    report = prune(model, plan, "wanda", batches=few)
    assert report.results["expert_sparsity"][name] == pytest.approx(own, abs=1e-3)
    assert sum("pruned by magnitude" in note for note in report.notes) == 2 * len(experts.unseen[name])


def test_no_sparsity_and_all_of_it():
    for budget in (0.0, 1.0):
        plan = planned(build_mixture("mixtral"), budget, None)
        assert {*plan.common, *(v for own in plan.experts.values() for v in own)} == {budget}


def test_a_killed_run_resumes(tmp_path, monkeypatch):
    batches, whole = two_batches(build_mixture("mixtral")), build_mixture("mixtral")
    plan = planned(whole)
    expected, add = prune(whole, plan, batches=batches), FinishedLayers.add

    def dies(self, index, note):
        if index == 2:
            raise KeyboardInterrupt
        add(self, index, note)

    monkeypatch.setattr(FinishedLayers, "add", dies)
    with pytest.raises(KeyboardInterrupt):
        prune(build_mixture("mixtral"), plan, batches=batches, journal=tmp_path)
    added = []
    monkeypatch.setattr(FinishedLayers, "add", lambda self, i, note: (added.append(i), add(self, i, note)))
    resumed = build_mixture("mixtral")
    report = prune(resumed, plan, batches=batches, journal=tmp_path)
    assert added == [2, 3] and report.results == expected.results
    assert torch.equal(outputs(resumed), outputs(whole))
    other = replace(plan, experts={name: own[::-1] for name, own in plan.experts.items()})
    prune(build_mixture("mixtral"), other, batches=batches, journal=tmp_path)
    assert added == [2, 3, 0, 1, 2, 3], "sparsities of other experts are other work"


def test_what_cannot_be():
    model = build_mixture("mixtral")
    scores, experts = scored(model)
    plan = allocate(scores, "sparsity", 0.5, expert_scores=experts)
    matrices = score_layers(model, method="weight_norm", granularity="module")
    shorter = replace(scores, values=scores.values[:3], parameters=scores.parameters[:3])
    bad = [
        ({"expert_scores": None, "granularity": "expert"}, "expert_scores: expected some with granularity expert"),
        ({"granularity": "layer"}, "expert_scores: expected none with granularity layer"),
        (
            {"kind": "bits", "budget": 3.5},
            "expert_scores: expected none for bits, got some; plan_bits",
        ),
        ({"kind": "probability"}, "expert_scores: expected none for probability"),
        ({"scores": matrices}, "expert_scores: expected none with scores of granularity module"),
        ({"layer_parameters": [1] * 4}, "layer_parameters: expected none with granularity expert"),
        ({"scores": shorter}, "expert_scores: expected those of MixtralForCausalLM, with at most 0 weights in layer 3"),
    ]
    for changes, message in bad:
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            allocate(**{"scores": scores, "expert_scores": experts, "budget": 0.5, **changes})
    few = replace(plan, experts={name: own[:3] for name, own in plan.experts.items()})
    with pytest.raises(ValueError, match=r"^plan: expected values of 4 experts of model.layers.0.mlp.experts, got 3"):
        prune(model, few, "magnitude")
    above = replace(plan, experts={name: [2.0] * 4 for name in plan.experts})
    with pytest.raises(ValueError, match=r"^plan: expected sparsities in 0..1, got 2.0 in model.layers.0"):
        prune(model, above, "magnitude")
    for broken in ({"common": []}, {"experts": {}}, {"granularity": "layer"}):
        with pytest.raises(ValueError, match=r"^experts: expected some, and common of each layer, for expert"):
            replace(plan, **broken).check_read()
    with pytest.raises(ValueError, match=r"^experts\['model.layers.0.mlp.experts'\]\[0\]: expected sparsity in 0..1"):
        above.check_read()


RELOADED = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
own = model.model.layers[3].mlp.experts.down_proj
print([round(float((W == 0).double().mean()), 6) for W in own])
"""


@pytest.mark.process
def test_zeros_of_experts_are_there_in_a_process_without_the_package(tmp_path):
    model = build_mixture("mixtral")
    prune(model, planned(model), "magnitude")
    model.save_pretrained(tmp_path)
    bank: nn.Parameter = model.model.layers[3].mlp.experts.down_proj
    expected = [round(float((W == 0).double().mean()), 6) for W in bank]
    assert str(expected) in run_fresh(RELOADED, tmp_path).stdout and len({*expected}) > 1


@pytest.mark.real
def test_reap_by_expert_on_the_trained_mixture(mixture):
    """At 70 %, experts by REAP have a lower perplexity than the same sparsity of all."""
    from hf_cod import perplexity, token_batches
    from hf_cod.io.models import EMBEDDED, load_model

    intact, tokenizer = load_model(mixture)
    intact.float()
    texts = [(EMBEDDED / "held_out.txt").read_text(encoding="utf-8")]
    batches = [*token_batches(tokenizer, texts, sequence_length=256, max_samples=32, batch_size=4)]
    experts = score_experts(intact, method="reap", batches=batches[:4])
    alike = score_layers(intact, method="uniform")
    found = {}
    for name, own in (("uniform", None), ("expert", experts)):
        model = copy.deepcopy(intact)
        prune(model, allocate(alike, "sparsity", 0.7, 0.15, expert_scores=own), batches=batches[:4])
        found[name] = perplexity(model, batches[4:])
    assert found["expert"] < 0.95 * found["uniform"]
