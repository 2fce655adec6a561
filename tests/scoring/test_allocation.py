import logging
import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hf_cod import LayerAllocation, LayerScores, allocate

SCORES = LayerScores("tiny", "owl", [0.01, 0.05, 0.02, 0.011], [100, 200, 100, 300])


def mean(plan, parameters=SCORES.parameters):
    return sum(v * n for v, n in zip(plan.values, parameters, strict=True)) / sum(parameters)


def test_sparsity_is_least_where_the_score_is_highest():
    plan = allocate(SCORES, "sparsity", budget=0.7, spread=0.08)
    assert mean(plan) == plan.mean == pytest.approx(0.7, abs=1e-12)
    assert min(plan.values) == plan.values[1] >= 0.62 - 1e-12
    assert max(plan.values) == plan.values[0] <= 0.78 + 1e-12


def test_parameters_can_be_given():
    plan = allocate(SCORES, budget=0.7, spread=0.08, layer_parameters=[1, 1, 1, 1])
    assert sum(plan.values) / 4 == pytest.approx(0.7, abs=1e-12)


def test_bits_and_rank_are_highest_where_the_score_is():
    bits = allocate(SCORES, "bits", budget=3.5)
    assert set(bits.values) <= {3, 4} and bits.values[1] == 4 and bits.values[0] == 3
    assert abs(bits.mean - 3.5) <= 300 / 700 / 2
    for kind in ("rank", "probability"):
        plan = allocate(SCORES, kind, budget=0.5, spread=0.1)
        assert max(plan.values) == plan.values[1] and plan.mean == pytest.approx(0.5)


@pytest.mark.parametrize("budget, spread", [(0.5, 0.08), (0.5, 0.25), (0.7, 0.08), (0.625, 0.0)])
def test_n_of_m_differs_between_layers_and_keeps_the_mean(budget, spread):
    equal = LayerScores("tiny", "owl", [0.01, 0.05, 0.02, 0.011, 0.03, 0.014, 0.018, 0.012], [64] * 8)
    plan = allocate(equal, budget=budget, spread=spread, group=8)
    assert abs(plan.mean - budget) <= 1 / 8 / 8 / 2 + 1e-12
    assert plan.patterns == [(8 - round(8 * value), 8) for value in plan.values]
    assert all(budget - spread - 1 / 8 < value < budget + spread + 1 / 8 for value in plan.values)


def test_n_of_m_leaves_weights_in_each_layer():
    scores = LayerScores("tiny", "owl", [0.01, 0.05, 0.02, 0.011], [64] * 4)
    plan = allocate(scores, budget=0.85, group=8)
    assert min(n for n, _ in plan.patterns) >= 1 and abs(plan.mean - 0.85) <= 1 / 8 / 4 / 2 + 1e-12
    fine = allocate(scores, budget=0.9, group=16)
    assert min(n for n, _ in fine.patterns) >= 1 and abs(fine.mean - 0.9) <= 1 / 16 / 4 / 2 + 1e-12
    with pytest.raises(ValueError, match=r"budget: .* in 0..0.875, got 0.9 \(one weight of 8 is kept in each layer\)"):
        allocate(scores, budget=0.9, group=8)
    with pytest.raises(ValueError, match=r"spread: expected 0..0.025, so that 0.85 -\+ spread is in 0..0.875"):
        allocate(scores, budget=0.85, spread=0.1, group=8)


layers = st.integers(1, 12).flatmap(
    lambda n: st.tuples(
        st.lists(st.sampled_from([0.0, 1.0, 2.0]) | st.floats(-1e6, 1e6), min_size=n, max_size=n),
        st.lists(st.integers(1, 10**6), min_size=n, max_size=n),
    )
)


@given(
    layers, st.floats(0, 1), st.sampled_from([("bits", 3, 4, None), ("sparsity", 0, 7 / 8, 8), ("rank", 0, 1, None)])
)
@example(([0.0, 1.0, 2.0, 3.0], [100, 1, 1, 1]), 0.9, ("sparsity", 0, 7 / 8, 8))
@example(([2.0, 1.0, 0.0], [7, 1, 1]), 0.5, ("bits", 3, 4, None))
def test_values_follow_the_order_of_the_scores_whatever_the_parameters(drawn, share, kind):
    name, low, high, group = kind
    scores = LayerScores("m", "owl", *drawn)
    plan = allocate(scores, name, budget=low + share * (high - low), group=group)
    sign = -1 if name == "sparsity" else 1
    ranked = sorted(zip(scores.values, plan.values, strict=True), key=lambda pair: pair[0])
    for i, (D, value) in enumerate(ranked):
        assert all(sign * later >= sign * value for E, later in ranked[i:] if E > D)


def test_scores_that_were_measured_for_another_sparsity(caplog):
    scores = LayerScores("tiny", "sensitivity", [1.0, 2.0], [3, 5], {"target": 0.7})
    with caplog.at_level(logging.WARNING, "hf_cod"):
        allocate(scores, budget=0.7)
        allocate(scores, "bits", budget=3.5)
        assert not caplog.text
        allocate(scores, budget=0.5)
    assert "sensitivity measured them at sparsity 0.7, but the budget is 0.5" in caplog.text


def test_equal_scores_and_a_single_layer():
    assert allocate(LayerScores("m", "uniform", [1.0, 1.0], [3, 5]), budget=0.6).values == pytest.approx([0.6, 0.6])
    assert allocate(LayerScores("m", "owl", [0.2], [3]), budget=0.6).values == pytest.approx([0.6])


def test_authors_rule_leaves_the_interval():
    plan = allocate(SCORES, budget=0.7, spread=0.08, rule="authors")
    assert sum(plan.values) / 4 == pytest.approx(0.7)
    assert max(plan.values) - min(plan.values) == pytest.approx(0.16) and min(plan.values) < 0.62


def test_save_and_load(tmp_path):
    plan = allocate(SCORES, budget=0.5, group=8)
    assert LayerAllocation.load(plan.save(tmp_path / "plan.json")) == plan
    with pytest.raises(ValueError, match="allocation: expected a file"):
        LayerAllocation.load(tmp_path / "none.json")
    with pytest.raises(ValueError, match="group: expected an allocation of N:M"):
        _ = allocate(SCORES).patterns


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"budget": 1.2}, "budget: expected sparsity in 0..1, got 1.2"),
        ({"budget": -0.1}, "budget: expected"),
        ({"budget": math.nan}, "budget: expected"),
        (
            {"budget": 0.95, "spread": 0.08},
            "spread: expected 0..0.05, so that 0.95 -[+] spread is in 0..1, got 0.08",
        ),
        ({"spread": -0.1}, "spread: expected"),
        ({"spread": math.nan}, "spread: expected"),
        ({"budget": 0.05, "spread": 0.05, "rule": "authors"}, "spread: expected one that leaves each sparsity in 0..1"),
        ({"rule": "best"}, "rule: expected one of bounded, authors"),
        ({"kind": "rank", "rule": "authors"}, "rule: expected bounded for rank"),
        ({"kind": "width"}, "kind: expected one of sparsity, bits, rank, parameter_share, probability, got 'width'"),
        ({"kind": "bits", "budget": 5}, "budget: expected bits in 3..4, got 5"),
        ({"kind": "bits", "budget": 3.5, "spread": 0.1}, "spread: expected none for bits"),
        ({"kind": "bits", "budget": 3.5, "choices": [4, 3]}, "choices: expected rising values"),
        ({"choices": [0, 2]}, "choices: expected values in 0..1"),
        ({"group": 1}, "group: expected at least 2"),
        ({"budget": "0.5"}, "budget: expected a number or None, got '0.5'"),
        ({"budget": True}, "budget: expected a number or None, got True"),
        ({"spread": [0.1]}, "spread: expected a number"),
        ({"group": 8.0}, "group: expected"),
        ({"group": 8, "budget": 0.9}, "budget: expected sparsity in 0..0.875"),
        ({"layer_parameters": [1, 2]}, "parameters: expected 4 counts"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        allocate(SCORES, **arguments)
