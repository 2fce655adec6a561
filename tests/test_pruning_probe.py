import math

import pytest
import torch
from torch import nn

from hf_cod import allocate, collect_statistics, find_decoder_layers, prune, score_layers
from hf_cod.allocation import LayerAllocation
from hf_cod.pruning_probe import PruningProbe
from hf_cod.scores import CANDIDATES, METHODS
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
    plans = [[0.5] * 4, [0.2, 0.4, 0.6, 0.8]]
    found = PruningProbe(find_decoder_layers(model), statistics, [batch], False).plans(plans)
    for plan, loss in zip(plans, found, strict=True):
        pruned = build(family)
        prune(pruned, LayerAllocation("sparsity", 0.5, plan, [1] * 4, "x"), statistics=statistics)
        assert loss == pytest.approx(loss_of(family, pruned, batch), rel=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_single_layers_cost_what_models_with_that_layer_pruned_cost(family):
    model, batch, statistics = setting(family)
    before = [p.detach().clone() for p in model.parameters()]
    found = PruningProbe(find_decoder_layers(model), statistics, [batch], False).single_layers(0.7)
    intact = loss_of(family, model, batch)
    for layer, grown in enumerate(found):
        pruned = build(family)
        plan = [0.7 if i == layer else 0.0 for i in range(4)]
        prune(pruned, LayerAllocation("sparsity", 0.5, plan, [1] * 4, "x"), statistics=statistics)
        assert grown == pytest.approx(loss_of(family, pruned, batch) - intact, abs=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    values = score_layers(model, statistics, "sensitivity", batches=[batch], target=0.7).values
    least = min([x for x in found if x > 1e-4] or [1e-4])
    assert values == pytest.approx([math.log(max(grown, least)) for grown in found], abs=1e-4)


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


def test_refusals():
    model, batch, statistics = setting("llama")
    for method in ("auto", "sensitivity"):
        assert method in METHODS
        with pytest.raises(ValueError, match=f"batches: expected at least one for the method {method}, got none"):
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
        PruningProbe(find_decoder_layers(model), statistics, [batch], False)
