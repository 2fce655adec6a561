import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_cod.functional import depth
from tests import references


def test_angular_distances_of_known_vectors():
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0], [1.0, 1.0]])
    expected = torch.tensor([[0, 0.5, 1, 0.25], [0.5, 0, 0.5, 0.25], [1, 0.5, 0, 0.75], [0.25, 0.25, 0.75, 0]])
    torch.testing.assert_close(depth.angular_distances(x), expected.double(), atol=1e-12, rtol=0)


def test_near_vectors_keep_their_small_distance():
    x = torch.tensor([[1.0, 0.0], [math.cos(1e-4), math.sin(1e-4)]], dtype=torch.float64)
    assert depth.angular_distances(x)[0, 1].item() == pytest.approx(1e-4 / math.pi, rel=1e-6)


def test_layout_is_the_papers():
    distances = torch.tensor([[0.0, 1, 2, 3], [1, 0, 4, 5], [2, 4, 0, 6], [3, 5, 6, 0]])
    nan = math.nan
    expected = torch.tensor([[1.0, 2, 3], [4, 5, nan], [6, nan, nan]])
    torch.testing.assert_close(depth.by_layer_and_step(distances), expected, equal_nan=True)


def test_block_influence_against_reference():
    x, y = torch.randn(2, 2, 5, 7).unbind(0)
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])
    ours = depth.block_influence(x, y, mask.bool()).double().mean()
    assert float(ours) == pytest.approx(references.block_influence([x.double(), y.double()], mask)[0], abs=1e-6)


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=40))
def test_effective_depth_lies_between_one_and_all_layers(contributions):
    value = float(depth.effective_depth(torch.tensor(contributions, dtype=torch.float64)))
    assert 1 - 1e-9 <= value <= len(contributions) + 1e-9


@pytest.mark.parametrize(
    "contributions, expected",
    [([0.3] * 7, 7), ([0, 0, 5.0, 0], 1), ([0.2, 0, 0.2, 0.2, 0], 3), ([0.0, 0.0], 2), ([0.4], 1)],
)
def test_effective_depth_of_known_shares(contributions, expected):
    assert float(depth.effective_depth(torch.tensor(contributions))) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "contributions, expected",
    [([1.0, 1.0], 0.5), ([3.0, 1.0], 0.25), ([1.0, 2.0, 1.0], 0.5), ([0.0, 0.0, 5.0], 1), ([0.0], 0.5), ([2.0], 0.5)],
)
def test_late_share_of_known_contributions(contributions, expected):
    assert float(depth.late_share(torch.tensor(contributions))) == pytest.approx(expected)


def test_bootstrap_covers_the_mean_at_its_confidence():
    generator = torch.Generator().manual_seed(5)
    hits = 0
    for seed in range(200):
        samples = torch.randn(60, 1, generator=generator, dtype=torch.float64) + 3
        low, high = depth.bootstrap_interval(samples, lambda mean: mean[:, 0], draws=400, seed=seed)
        hits += low <= 3 <= high
    assert 0.88 <= hits / 200 <= 0.99


def test_bootstrap_of_one_sample_is_a_point():
    low, high = depth.bootstrap_interval(torch.tensor([[0.1, 0.3]]), depth.effective_depth)
    assert low == pytest.approx(high)


def test_spearman_against_scipy():
    from scipy.stats import spearmanr

    a, b = torch.randint(0, 6, (2, 40)).double()
    assert depth.spearman(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert depth.spearman(torch.ones(4), torch.arange(4)) == 0


def test_moments_add_up():
    x = torch.randn(3, 4, 5) * 3 + 1
    mask = torch.rand(3, 4) > 0.3
    count, total, squares, largest = depth.moments(x, mask).tolist()
    rows = x[mask].double()
    assert count == rows.numel()
    assert total == pytest.approx(float(rows.sum()))
    assert squares == pytest.approx(float(rows.square().sum()))
    assert largest == pytest.approx(float(rows.abs().max()))
