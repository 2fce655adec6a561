import copy
import re
from dataclasses import replace

import peft
import pytest
import torch
from accelerate import cpu_offload
from torch import nn
from transformers import AutoModelForCausalLM

from hf_cod import LayerAllocation, LayerScores, allocate, collect_statistics, find_decoder_layers, prune, score_layers
from hf_cod.compression.pruning.methods import METHODS
from hf_cod.layers.finished_layers import FinishedLayers
from tests import references
from tests.tiny_models import (
    CAUSAL,
    MIXTURE_TYPES,
    MIXTURES,
    OTHERS,
    PLAIN,
    batch_for,
    build,
    build_mixture,
    two_batches,
    unmapped_outputs,
)


def matrices(model):
    stack = find_decoder_layers(model)
    return {name: W.clone() for i in range(len(stack)) for name, W in stack.matrices(i)}


def write(model, name, W):
    module = model.get_submodule(name)
    module.weight.data.copy_(W if isinstance(module, nn.Linear) else W.T)


def pruned_by_hand(model, batches, S, method, pattern=None):
    """Layer by layer: the whole model runs, with the layers before pruned already, and every matrix by the formula."""
    model = copy.deepcopy(model)
    for index in range(len(find_decoder_layers(model))):
        for name, (W, X) in references.linear_inputs(model, batches, index).items():
            if method == "sparsegpt":
                pruned = references.optimal_brain_surgeon(W, X.T @ X, S, pattern, 0.01, 128)
            elif pattern is not None:
                pruned = W.masked_fill(references.group_mask(W.abs() * X.norm(dim=0), *pattern), 0)
            else:
                pruned = W.masked_fill(references.wanda_mask(W, X.norm(dim=0), S), 0)
            write(model, name, pruned)
    return model


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("family", PLAIN)
def test_wanda_flows_through_every_family(family, padding):
    model = build(family, layers=3, dtype=torch.float64)
    batches = [
        {k: v.double() if v.is_floating_point() else v for k, v in b.items()} for b in two_batches(model, padding)
    ]
    expected = pruned_by_hand(model, batches, 0.6, "wanda")
    prune(model, 0.6, "wanda", batches=batches)
    for name, W in matrices(expected).items():
        assert torch.equal(matrices(model)[name], W), name


@pytest.mark.parametrize("pattern", [None, (2, 4)])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "olmo2"])
def test_sparsegpt_flows_through_families(family, pattern):
    # ReLU leaves channels that are always zero, which the plain formula knows nothing of.
    changes = {"activation_function": "gelu"} if family == "opt" else {}
    model = build(family, layers=2, dtype=torch.float64, **changes)
    batches = two_batches(model, "right")
    expected = pruned_by_hand(model, batches, 0.5, "sparsegpt", pattern)
    prune(model, 0.5 if pattern is None else "2:4", "sparsegpt", batches=batches)
    for name, W in matrices(expected).items():
        torch.testing.assert_close(matrices(model)[name], W, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", MIXTURES)
def test_experts_are_pruned_on_their_own_tokens(family, method):
    model = build(family, layers=2)
    batches = two_batches(model)
    intact = matrices(model)
    first = {name for name in intact if ".0." in name.split("experts")[0]}
    statistics = collect_statistics(model, batches)
    report = prune(model, 0.5, method, batches=batches)
    assert report.results["sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert all(re.search(r"are in no matrix: \w+Router \([\d,]+\)$", note) for note in report.notes)
    if method == "wanda":
        for name in first:  # what enters the first layer does not depend on pruning, so intact statistics serve
            W, squares = intact[name], statistics.squares[name]
            parts = [(W, squares)] if W.dim() == 2 else list(zip(W, squares, strict=True))
            found = matrices(model)[name].reshape(len(parts), *parts[0][0].shape)
            for part, (w, s) in zip(found, parts, strict=True):
                assert torch.equal(part == 0, references.wanda_mask(w, s.sqrt().float(), 0.5)), name


FAST = ("mixtral", "gpt_oss", "llama4_text")
KINDS = [pytest.param(kind, marks=[] if kind in FAST else pytest.mark.families) for kind in MIXTURE_TYPES]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_of_a_mixture_counts(kind, method, tmp_path):
    """Each expert has its share of zeros; a reload computes the same bit by bit."""
    model = build_mixture(kind)
    stack = find_decoder_layers(model)
    report = prune(model, 0.5, method, batches=two_batches(model))
    found = {name: W for index in range(4) for name, W in stack.matrices(index)}
    total = sum(W.numel() for W in found.values())
    assert sum(report.layers["parameters"]) == total == sum(stack.count_weights(index) for index in range(4))
    zeros = sum(int((W == 0).sum()) for W in found.values())
    assert report.results["sparsity"] == pytest.approx(zeros / total) == pytest.approx(0.5, abs=2e-3)
    for matrix in (m for index in range(4) for m in stack.expert_matrices(index)):
        assert [float((W == 0).double().mean()) for W in matrix.weights()] == pytest.approx([0.5] * 4, abs=0.02)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(unmapped_outputs(again), unmapped_outputs(model))


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_experts_never_seen_fall_back_and_are_named(method):
    model = build("mixtral", layers=1, num_local_experts=12, num_experts_per_tok=1)
    bank = model.model.layers[0].mlp.experts
    intact = bank.down_proj.detach().clone()
    report = prune(model, 0.5, method, batches=[{"input_ids": torch.tensor([[5, 6, 7]])}])
    named = [int(note.split(":")[0].split(".")[-1]) for note in report.notes if ".down_proj." in note]
    assert len(named) >= 9 and all(note.endswith("pruned by magnitude") for note in report.notes[1:])
    for expert in named:
        assert torch.equal(bank.down_proj[expert] == 0, references.magnitude_mask(intact[expert], 0.5))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_statistics_of_the_intact_model_prune_in_one_pass(family):
    model = build(family)
    intact, statistics = matrices(model), collect_statistics(model, two_batches(model))
    prune(model, 0.7, "wanda", statistics=statistics)
    for name, W in matrices(model).items():
        s, w = statistics.squares[name].sqrt().float(), intact[name]
        pairs = [(W, w, s)] if W.dim() == 2 else zip(W, w, s, strict=True)
        for found, before, norms in pairs:
            assert torch.equal(found, before.masked_fill(references.wanda_mask(before, norms, 0.7), 0)), name


def test_magnitude_needs_no_text():
    model = build("bert")
    intact = matrices(model)
    prune(model, 0.3, "magnitude")
    for name, W in matrices(model).items():
        assert torch.equal(W, intact[name].masked_fill(references.magnitude_mask(intact[name], 0.3), 0))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", [*CAUSAL, *OTHERS])
def test_nothing_but_matrices_changes_and_the_model_is_left_as_it_was(family, method):
    model = build(family, dtype=torch.bfloat16).train()
    batches = [{k: v.bfloat16() if v.is_floating_point() else v for k, v in batch_for(model).items()}]
    stack = find_decoder_layers(model)
    written = {id(W) for i in range(4) for W in [m.weight for m in stack.linears(i).values()]}
    written |= {
        id(p) for i in range(4) for bank in stack.experts(i).values() for p in bank.parameters() if p.dim() == 3
    }
    others = {name: p.detach().clone() for name, p in model.named_parameters() if id(p) not in written}
    use_cache = getattr(model.config, "use_cache", None)
    report = prune(model, 0.5, method, batches=batches)
    assert report.results["sparsity"] == pytest.approx(0.5, abs=2e-3)
    assert all(torch.equal(p, others[name]) for name, p in model.named_parameters() if name in others)
    assert all(module.training for module in model.modules()) and getattr(model.config, "use_cache", None) == use_cache
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_an_allocation_is_met_layer_by_layer(tmp_path):
    model = build("llama")
    scores = LayerScores("m", "mine", [3.0, 1.0, 2.0, 2.5], [find_decoder_layers(model).count_weights(0)] * 4)
    plan = allocate(scores, budget=0.6, spread=0.1)
    report = prune(model, plan, batches=[batch_for(model)])
    assert report.layers["target"] == plan.values and max(plan.values) - min(plan.values) > 0.15
    assert report.layers["sparsity"] == pytest.approx(plan.values, abs=1e-3)
    assert report.settings["plan"] == "0.6 by mine" and report.settings["tokens"] == 27
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, W in matrices(again).items():
        assert torch.equal(W, matrices(model)[name])
        assert float((W == 0).float().mean()) == pytest.approx(report.results["module_sparsity"][name], abs=1e-6)
    torch.testing.assert_close(again(**batch_for(model)).logits, model(**batch_for(model)).logits, rtol=0, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_a_pattern_of_its_own_for_each_layer(method):
    model = build("llama")
    scores = LayerScores("m", "mine", [3.0, 1.0, 2.0, 2.5], [find_decoder_layers(model).count_weights(0)] * 4)
    plan = allocate(scores, budget=0.5, spread=0.25, group=8)
    assert len(set(plan.patterns)) > 2
    prune(model, plan, method, batches=[batch_for(model)])
    stack = find_decoder_layers(model)
    for index, (N, M) in enumerate(plan.patterns):
        for _, W in stack.matrices(index):
            assert ((W != 0).view(-1, M).sum(-1) == N).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stop", range(5))
def test_a_killed_run_goes_on_and_ends_in_the_same_bits(method, stop, tmp_path, monkeypatch):
    batches = two_batches(build("llama"), "left")
    whole = build("llama")
    expected = prune(whole, 0.5, method, batches=batches)
    add, done = FinishedLayers.add, []

    def dies(self, index, unseen):
        if len(done) == stop:
            raise KeyboardInterrupt
        done.append(index)
        add(self, index, unseen)

    monkeypatch.setattr(FinishedLayers, "add", dies)
    if stop < 4:
        with pytest.raises(KeyboardInterrupt):
            prune(build("llama"), 0.5, method, batches=batches, journal=tmp_path)
    else:
        prune(build("llama"), 0.5, method, batches=batches, journal=tmp_path)
    assert len(list(tmp_path.iterdir())) == stop
    added = []
    monkeypatch.setattr(FinishedLayers, "add", lambda self, i, unseen: (added.append(i), add(self, i, unseen)))
    resumed = build("llama")
    report = prune(resumed, 0.5, method, batches=batches, journal=tmp_path)
    assert added == list(range(stop, 4)), "finished layers are not pruned again"
    assert report.layers == expected.layers and report.results == expected.results
    for (name, a), b in zip(resumed.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_other_work_in_the_same_journal_is_not_taken(tmp_path):
    batches = [batch_for(build("llama"))]
    prune(build("llama"), 0.5, batches=batches, journal=tmp_path)
    for change in ({"plan": 0.6}, {"method": "magnitude"}, {"batches": two_batches(build("llama"))}):
        settings = {"plan": 0.5, "method": "wanda", "batches": batches, **change}
        model, expected = build("llama"), build("llama")
        prune(model, journal=tmp_path, **settings)
        prune(expected, **settings)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    assert len(list(tmp_path.iterdir())) == 16


@pytest.mark.parametrize("plan", [-0.1, 1.5, float("nan"), True, None, [0.5]])
def test_sparsity_out_of_range(plan):
    with pytest.raises(ValueError, match=r"plan: expected (a sparsity in 0..1|LayerAllocation, a number or a string)"):
        prune(build("llama"), plan, "magnitude")


@pytest.mark.parametrize("plan", ["2:", "4:2", "0:4", "half", "2:4:8"])
def test_no_pattern(plan):
    with pytest.raises(ValueError, match="pattern: expected N:M with 0 < N <= M"):
        prune(build("llama"), plan, "magnitude")


def test_plans_of_another_kind_or_model():
    model = build("llama")
    for plan, message in [
        (
            LayerAllocation("bits", 3, [3.0] * 4, [1] * 4, "x"),
            "plan: expected an allocation of sparsity, got one of bits",
        ),
        (LayerAllocation("sparsity", 0.5, [0.5] * 3, [1] * 3, "x"), "plan: expected 4 values, one a layer, got 3"),
        (LayerAllocation("sparsity", 0.5, [0.5, 1.2, 0.1, 0], [1] * 4, "x"), "got 1.2 in layer 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            prune(model, plan, "magnitude")
    with pytest.raises(ValueError, match=r"pattern: expected rows of a multiple of 5 weights, got 32 in .*q_proj"):
        prune(model, "2:5", "magnitude")


def test_what_a_method_needs():
    model = build("llama")
    statistics = collect_statistics(model, [batch_for(model)])
    with pytest.raises(ValueError, match=f"method: expected one of {', '.join(METHODS)}, got 'best'"):
        prune(model, 0.5, "best")
    with pytest.raises(ValueError, match="batches: expected batches, or tokenizer and texts, for wanda, got neither"):
        prune(model, 0.5)
    with pytest.raises(ValueError, match="batches: expected at least one for wanda, got none"):
        prune(model, 0.5, batches=[])
    with pytest.raises(ValueError, match="expected batches or statistics, got both"):
        prune(model, 0.5, batches=[batch_for(model)], statistics=statistics)
    with pytest.raises(ValueError, match="expected batches for sparsegpt, got statistics, which hold sums of squares"):
        prune(model, 0.5, "sparsegpt", statistics=statistics)
    with pytest.raises(ValueError, match="statistics: expected those of LlamaForCausalLM"):
        prune(build("llama", intermediate_size=64), 0.5, statistics=statistics)


def test_weights_that_cannot_be_pruned_are_refused_before_anything_changes():
    shared, tied, quantized, broken = (build("llama") for _ in range(4))
    shared.model.layers[3].mlp.up_proj = shared.model.layers[1].mlp.up_proj
    tied.model.layers[2].self_attn.k_proj.weight = tied.model.layers[2].self_attn.v_proj.weight
    weight = quantized.model.layers[2].mlp.up_proj.weight
    quantized.model.layers[2].mlp.up_proj.weight = nn.Parameter(weight.char(), requires_grad=False)
    with torch.no_grad():
        broken.model.layers[3].mlp.up_proj.weight[3, 4] = torch.inf
    adapted = peft.get_peft_model(build("llama"), peft.LoraConfig(target_modules=["up_proj"]))
    offloaded = build("llama")
    cpu_offload(offloaded, torch.device("cpu"))
    for model, message in [
        (
            shared,
            r"separate weight for each matrix, got model.layers.1.mlp.up_proj.weight, which is shared with model",
        ),
        (
            tied,
            r"got model.layers.2.self_attn.k_proj.weight, which is shared with model.layers.2.self_attn.v_proj.weight",
        ),
        (quantized, r"floating-point weights, got Parameter torch.int8 in model.layers.2.mlp.up_proj"),
        (broken, "weights: expected finite numbers, got NaN or infinity in model.layers.3.mlp.up_proj"),
        (adapted, r"got an adapter at model.layers.0.mlp.up_proj; call merge_and_unload first"),
        (offloaded, r"in memory, got offloaded ones in model.layers.0.self_attn.q_proj"),
    ]:
        before = [p.detach().clone() for p in model.parameters()]
        with pytest.raises(ValueError, match=message):
            prune(model, 0.5, batches=[batch_for(build("llama"))])
        if model is not offloaded:
            assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_activations_that_are_not_finite_are_told_with_their_module(method):
    model = build("llama")
    hook = model.model.layers[2].input_layernorm.register_forward_hook(lambda module, args, out: out * torch.nan)
    with pytest.raises(
        ValueError, match=r"activations: .* first at the input of model.layers.2.self_attn.q_proj, batch 0"
    ):
        prune(model, 0.5, method, batches=two_batches(model))
    hook.remove()
    with torch.no_grad():
        model.model.layers[2].input_layernorm.weight[3] = torch.nan
    with pytest.raises(ValueError, match=r"weights: .* NaN or infinity in model.layers.2.input_layernorm"):
        prune(model, 0.5, method, batches=two_batches(model))


def test_a_plan_of_another_model(caplog):
    model, wide = build("llama"), build("llama", intermediate_size=96)
    plan = allocate(score_layers(model, method="random"), budget=0.5)
    with pytest.raises(ValueError, match=r"plan: expected those of a model with \d+ weights in layer 0, got one with"):
        prune(wide, plan, "magnitude")
    prune(build("llama"), allocate(score_layers(model, method="random"), layer_parameters=[1] * 4), "magnitude")
    assert not caplog.text
    prune(build("llama"), replace(plan, model="someone/else"), "magnitude")
    assert "computed for someone/else, which has layers of the same sizes" in caplog.text


def test_statistics_of_another_model_of_the_same_shapes(caplog, tmp_path):
    """A name that differs is warned of, and a journal tells the statistics apart by all their numbers."""
    model = build("llama")
    found = collect_statistics(model, [batch_for(model)], name="/there/mine")
    model.config._name_or_path = "/here/mine"
    prune(model, 0.5, statistics=found, journal=tmp_path)
    assert not caplog.text
    flipped = replace(found, model="other", squares={name: sums.flip(-1) for name, sums in found.squares.items()})
    second, expected = build("llama"), build("llama")
    prune(second, 0.5, statistics=flipped, journal=tmp_path)
    assert "statistics: used on LlamaForCausalLM, but computed for other" in caplog.text
    prune(expected, 0.5, statistics=flipped)
    assert all(torch.equal(a, b) for a, b in zip(second.parameters(), expected.parameters(), strict=True))
