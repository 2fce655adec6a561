import itertools

import pytest
import torch

from hf_cod import LayerScores, allocate
from hf_cod.training.owlore.sampling import LayerSampler


def scores(values):
    return LayerScores("model", "owl", values, [10] * len(values))


def test_draws_depend_on_seed_and_number_alone():
    first = LayerSampler(scores([0.1, 0.2, 0.3, 0.4]), 2, seed=3)
    again = LayerSampler([1, 2, 3, 4], 2, seed=3)
    torch.manual_seed(1)
    draws = [first.draw(number) for number in range(20)]
    assert [again.draw(number) for number in reversed(range(20))] == draws[::-1]
    assert all(len(set(draw)) == 2 and draw == sorted(draw) for draw in draws)
    assert [LayerSampler([1, 2, 3, 4], 2, seed=4).draw(number) for number in range(20)] != draws


def test_pairs_are_drawn_as_often_as_without_replacement():
    """P({i, j}) = p_i p_j / (1 - p_i) + p_j p_i / (1 - p_j)."""
    sampler = LayerSampler([1.0, 2.0, 5.0], 2, floor=0.1)
    p = sampler.probabilities
    assert p == pytest.approx([0.9 * s / 8 + 0.1 / 3 for s in (1, 2, 5)])
    n, found = 20_000, {}
    for number in range(n):
        pair = tuple(sampler.draw(number))
        found[pair] = found.get(pair, 0) + 1
    for i, j in itertools.combinations(range(3), 2):
        expected = p[i] * p[j] / (1 - p[i]) + p[j] * p[i] / (1 - p[j])
        assert found[i, j] / n == pytest.approx(expected, abs=4 * (expected / n) ** 0.5)


def test_the_floor_visits_every_layer():
    sampler = LayerSampler([0.0] * 31 + [1.0], 5, floor=0.5)
    assert set(itertools.chain.from_iterable(sampler.draw(number) for number in range(60))) == set(range(32))
    assert LayerSampler([3.0, 1.0], 1, floor=1.0).probabilities == [0.5, 0.5]
    assert LayerSampler([0.0, 0.0], 1, floor=0.0).probabilities == [0.5, 0.5]
    assert LayerSampler([1.0], 1).draw(7) == [0]


@pytest.mark.parametrize(
    "values, arguments, message",
    [
        ([1, 2], {"n_active": 3}, "n_active: expected between 1 and the model's 2 layers, got 3"),
        ([1, 2], {"n_active": 1, "floor": 1.5}, "floor: expected a share between 0 and 1, got 1.5"),
        ([1, -2], {"n_active": 1}, "scores: expected finite numbers of at least 0, got -2 in layer 1"),
        ([float("nan"), 2], {"n_active": 1}, "scores: expected finite numbers of at least 0, got nan in layer 0"),
        (
            [1, 0],
            {"n_active": 2, "floor": 0.0},
            "floor: expected above 0 to sample 2 layers, got 0 with 1 scores above 0",
        ),
    ],
)
def test_bad_input(values, arguments, message):
    with pytest.raises(ValueError, match=message):
        LayerSampler(values, **arguments)


def test_an_allocation_of_probability_is_kept():
    """Each layer is in a draw as often as it says; no floor."""
    plan = allocate(scores([0.1, 0.4, 0.2, 0.9, 0.4]), "probability", budget=0.4, spread=0.3)
    sampler, n = LayerSampler(plan, 2, seed=1), 3_000
    draws = [sampler.draw(number) for number in range(n)]
    assert all(len(set(draw)) == 2 and draw == sorted(draw) for draw in draws)
    for layer, p in enumerate(plan.values):
        found = sum(layer in draw for draw in draws) / n
        assert found == pytest.approx(p, abs=4 * (p * (1 - p) / n) ** 0.5)
    with pytest.raises(
        ValueError, match=r"scores: expected probabilities in 0..1, whose sum .* is n_active = 3, got a sum"
    ):
        LayerSampler(plan, 3)
    with pytest.raises(
        ValueError, match="scores: expected scores, or an allocation of probability, got one of sparsity"
    ):
        LayerSampler(allocate(scores([0.1, 0.4]), "sparsity", budget=0.5), 1)


def test_layers_that_cannot_be_drawn():
    sampler = LayerSampler([5.0, 1.0, 3.0, 1.0], 1, floor=0.2, layers=[1, 2])
    assert sampler.probabilities == pytest.approx([0, 0.8 / 4 + 0.1, 0.8 * 3 / 4 + 0.1, 0])
    assert {sampler.draw(number)[0] for number in range(50)} == {1, 2}
    with pytest.raises(ValueError, match="n_active: expected between 1 and the 2 trainable layers, got 3"):
        LayerSampler([5.0, 1.0, 3.0, 1.0], 3, layers=[1, 2])
