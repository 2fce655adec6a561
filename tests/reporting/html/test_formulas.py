"""The page's formulas are those of Python, to 1e-6, in the engines that are installed."""

import json
import math
import random

import pytest
import torch

from hf_cod import LayerScores, allocate
from hf_cod.functional.lost_energy import expected_loss, lost_by_bits, lost_by_sparsity
from tests.browser import needs_chromium, needs_node
from tests.reporting.html.scripts import in_chromium, in_node

CHOICES = [[3.0, 4.0], [2.0, 3.0, 4.0], [3.0, 4.0, 5.0, 6.0, 8.0], [4.0, 8.0]]


def scores_of(random):
    """Scores and weights as they occur: spread, with one outlier, equal, in few values, tiny or huge."""
    count = random.choice([1, 2, 3, 12, 30, 80])
    kind = random.randrange(5)
    values = [random.random() for _ in range(count)]
    if kind == 1:
        values[0] = 1000.0
    elif kind == 2:
        values = [random.choice([0.5, -0.25])] * count
    elif kind == 3:
        values = [round(4 * value) / 4 for value in values]
    elif kind == 4:
        values = [value * random.choice([1e-300, 1e300]) for value in values]
    weights = [random.choice([0, 1_000_000, 3_000_000]) for _ in values] if random.random() < 0.5 else [7] * count
    weights[-1] = weights[-1] or 1_000_000
    return values, weights


def cases():
    generator = random.Random(0)
    for number in range(400):
        values, weights = scores_of(generator)
        choices = CHOICES[number % 4]
        kind = "bits" if number % 2 else "sparsity"
        low, high = (choices[0], choices[-1]) if kind == "bits" else (0, 0.95)
        budget = round(generator.uniform(low, high), 2)
        spread = round(generator.uniform(0, 0.3), 2)
        yield {"scores": values, "weights": weights, "how": locals_of(kind, budget, spread, choices)}


def locals_of(kind, budget, spread, choices):
    return {"kind": kind, "budget": budget, "spread": spread, "choices": choices}


@pytest.fixture(
    scope="module", params=[pytest.param("node", marks=needs_node), pytest.param("chromium", marks=needs_chromium)]
)
def computed(request, tmp_path_factory):
    """What an engine computes for all cases, in one call."""
    shares, bits = [i / 200 for i in range(201)], [i / 10 for i in range(170)]
    drop = {"metric": "perplexity", "intact": 20.0, "without": [1e6, 21.0, 19.5]}
    loss = {"metric": "loss", "intact": 2.0, "without": [9.0, None, 2.5]}
    expression = (
        f"({{plans: {json.dumps([*cases()])}.map((each) => allocate(each.scores, each.weights, each.how)),"
        f"sparsity: {json.dumps(shares)}.map(lostBySparsity), bits: {json.dumps(bits)}.map(lostByBits),"
        f"removed: [0, 1, 2, 3].map((n) => leastCosts([3, NaN, 1, Infinity, 1], n)),"
        f"perplexity: expectedMetric({json.dumps(drop)}, [0.01, 0.5, 1]),"
        f"loss: expectedMetric({json.dumps(loss)}, [0.25, 0, 1])}})"
    )
    found = in_node(expression) if request.param == "node" else in_chromium(expression, tmp_path_factory.mktemp("page"))
    return {**found, "shares": shares, "widths": bits, "drop": drop}


@pytest.mark.process
def test_plans_are_those_of_allocate(computed):
    for case, found in zip(cases(), computed["plans"], strict=True):
        how, scores = case["how"], LayerScores("", "owl", case["scores"], case["weights"])
        budget = how["budget"]
        if how["kind"] == "bits":
            expected = allocate(scores, "bits", budget, choices=how["choices"])
        else:
            expected = allocate(scores, "sparsity", budget, min(how["spread"], budget, 1 - budget))
        assert found == pytest.approx(expected.values, abs=1e-6), case


@pytest.mark.process
def test_the_expected_metric_is_that_of_python(computed):
    double = {"dtype": torch.float64}
    expected = lost_by_sparsity(torch.tensor(computed["shares"], **double)).tolist()
    assert computed["sparsity"] == pytest.approx(expected, abs=1e-9)
    assert computed["bits"] == pytest.approx(
        lost_by_bits(torch.tensor(computed["widths"], **double)).tolist(), abs=1e-9
    )
    drop = computed["drop"]
    without, lost = torch.tensor(drop["without"], **double).log(), torch.tensor([0.01, 0.5, 1], **double)
    expected = math.exp(expected_loss(math.log(drop["intact"]), without, lost))
    assert computed["perplexity"] == pytest.approx(expected, rel=1e-9)
    assert computed["loss"] == pytest.approx(2.0 + 0.25 * 7 + 0.5)


@pytest.mark.process
def test_layers_of_least_cost_are_removed(computed):
    """Equal costs in the order of layers, as `plan_depth` does; what was not measured stays."""
    assert computed["removed"] == [[], [2], [2, 4], [0, 2, 4]]
