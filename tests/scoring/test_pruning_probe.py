import math

import pytest
import torch
from torch import nn

from hf_cod import allocate, collect_statistics, find_decoder_layers, prune, score_layers
from hf_cod.functional import codebook
from hf_cod.functional.bits import SCALE_BITS
from hf_cod.scoring.allocation import LayerAllocation
from hf_cod.scoring.methods import CANDIDATES, METHODS
from hf_cod.scoring.pruning_probe import PruningProbe
from tests import references
from tests.tiny_models import batch_for, build

FAMILIES = ["llama", "gpt2", "gemma3", "mixtral", "mpnet"]


def setting(family):
    model = build(family)
    batch = batch_for(model, "right")
    if family == "mpnet":
        batch["labels"] = batch["input_ids"]
    statistics = collect_statistics(model, [batch])
    return model, batch, statistics


def loss_of(family, model, batch):
    if family != "mpnet":
        return math.log(references.perplexity(model, batch))
    with torch.no_grad():
        return float(model(**batch).loss)


@pytest.mark.parametrize("family", FAMILIES)
def test_plans_cost_what_pruned_models_cost(family):
    model, batch, statistics = setting(family)
    before = [p.detach().clone() for p in model.parameters()]
    plans = [[0.5] * 4, [0.2, 0.4, 0.6, 0.8], [0.5, 0.5, 0.1, 0.5]]
    found = PruningProbe(find_decoder_layers(model), "wanda", statistics, [batch], False).plans(plans)
    for plan, loss in zip(plans, found, strict=True):
        pruned = build(family)
        prune(pruned, LayerAllocation("sparsity", 0.5, plan, [1] * 4, "x"), statistics=statistics)
        assert loss == pytest.approx(loss_of(family, pruned, batch), rel=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_sensitivity_is_the_slope_where_all_layers_are_pruned(family):
    model, batch, statistics = setting(family)
    before = [p.detach().clone() for p in model.parameters()]
    found = score_layers(model, statistics, "sensitivity", batches=[batch], target=0.7).values
    for layer, value in enumerate(found):
        losses = []
        for sparsity in (0.6, 0.8):
            pruned = build(family)
            plan = [sparsity if i == layer else 0.7 for i in range(4)]
            prune(pruned, LayerAllocation("sparsity", 0.7, plan, [1] * 4, "x"), statistics=statistics)
            losses.append(loss_of(family, pruned, batch))
        assert value == pytest.approx(losses[1] - losses[0], abs=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_sensitivity_by_magnitude_needs_no_statistics():
    model, batch, _ = setting("llama")
    found = score_layers(model, None, "sensitivity", batches=[batch], target=0.7, pruner="magnitude").values
    for layer, value in enumerate(found):
        losses = []
        for sparsity in (0.6, 0.8):
            pruned = build("llama")
            plan = [sparsity if i == layer else 0.7 for i in range(4)]
            prune(pruned, LayerAllocation("sparsity", 0.7, plan, [1] * 4, "x"), "magnitude")
            losses.append(loss_of("llama", pruned, batch))
        assert value == pytest.approx(losses[1] - losses[0], abs=1e-5)
    with pytest.raises(ValueError, match="pruner: expected one of wanda, magnitude, codebook, got 'sparsegpt'"):
        score_layers(model, None, "sensitivity", batches=[batch], pruner="sparsegpt")


def test_plans_that_begin_alike_share_their_way(monkeypatch):
    model, batch, statistics = setting("llama")
    runs = []
    step = PruningProbe._step
    monkeypatch.setattr(
        PruningProbe, "_step", lambda self, layer, before: runs.append(layer) or step(self, layer, before)
    )
    probe = PruningProbe(find_decoder_layers(model), "wanda", statistics, [batch], False)
    plans = [[0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.7, 0.5], [0.5, 0.5, 0.5, 0.5]]
    first, second, third = probe.plans(plans)
    assert first == third != second and sorted(runs) == [0, 1, 2, 2, 3, 3]


def test_auto_takes_the_best_of_what_it_tried():
    model, batch, statistics = setting("llama")
    scores = score_layers(model, statistics, "auto", batches=[batch], target=0.6)
    tried, chosen = scores.settings["losses"], scores.settings["chosen"]
    assert set(key.split()[0] for key in tried) == set(CANDIDATES)
    assert min(tried, key=tried.get) == f"{chosen} {scores.settings['spread']:g}"
    assert scores.values == score_layers(model, statistics, chosen, batches=[batch], target=0.6).values
    plan = allocate(scores, budget=0.6)
    prune(model, plan, statistics=statistics)
    assert math.log(references.perplexity(model, batch)) == pytest.approx(min(tried.values()), rel=1e-5)
    assert math.log(references.perplexity(model, batch)) <= tried["uniform 0"] + 1e-6


def round_layers(model, bits, statistics):
    """The model with each layer's matrices rounded to its bits."""
    stack = find_decoder_layers(model)
    for layer, width in enumerate(bits):
        for name, W in stack.matrices(layer):
            W.copy_(codebook.rounded(W, width, statistics.of(name)))
    return model


def test_bits_are_tried_by_rounding():
    model, batch, statistics = setting("llama")
    scores = score_layers(model, statistics, "sensitivity", batches=[batch], target=3.5, pruner="codebook")
    losses = []
    for plan in [[3, 3, 3, 3], *([4 if i == layer else 3 for i in range(4)] for layer in range(4))]:
        losses.append(math.log(references.perplexity(round_layers(build("llama"), plan, statistics), batch)))
    assert scores.values == pytest.approx([losses[0] - loss for loss in losses[1:]], abs=1e-5)
    auto = score_layers(model, statistics, "auto", batches=[batch], target=3.5, pruner="codebook")
    assert "spread" not in auto.settings
    plan = [int(bits) for bits in allocate(auto, "bits", budget=3.5 - SCALE_BITS).values]
    if auto.settings["chosen"] != "uniform":
        rounded = round_layers(build("llama"), plan, statistics)
        best = math.log(references.perplexity(rounded, batch))
        assert best == pytest.approx(min(auto.settings["losses"].values()), abs=1e-5)
    with pytest.raises(ValueError, match=r"target: expected bits between 3\.127 and 4\.127, got 0\.7"):
        score_layers(model, statistics, "auto", batches=[batch], pruner="codebook")


def test_refusals():
    model, batch, statistics = setting("llama")
    for method in ("auto", "sensitivity"):
        assert method in METHODS
        with pytest.raises(
            ValueError, match=f"batches: expected batches, or tokenizer and texts, for the method {method}, got neither"
        ):
            score_layers(model, statistics, method)
        with pytest.raises(ValueError, match="target: expected a sparsity between 0 and 1, got 1"):
            score_layers(model, statistics, method, batches=[batch], target=1.0)
        headless = build("bert_headless")
        with pytest.raises(ValueError, match="model: expected a language model to probe, got BertModel"):
            score_layers(headless, method=method, batches=[batch_for(headless)])
    model.model.layers[1].mlp.up_proj.weight = nn.Parameter(
        model.model.layers[1].mlp.up_proj.weight.char(), requires_grad=False
    )
    with pytest.raises(
        ValueError, match=r"floating-point weights, got Parameter torch.int8 in model.layers.1.mlp.up_proj"
    ):
        PruningProbe(find_decoder_layers(model), "wanda", statistics, [batch], False)


def test_a_loss_that_is_not_finite():
    model, batch, statistics = setting("llama")
    model.lm_head.register_forward_hook(lambda module, args, out: out * math.nan)
    with pytest.raises(ValueError, match=r"plans: expected a finite loss, got nan with sparsities 0.5, 0.5, 0.5, 0.5"):
        PruningProbe(find_decoder_layers(model), "wanda", statistics, [batch], False).plans([[0.5] * 4])
