import itertools

import pytest
import torch

from hf_cod.functional.ranks import count, most_rank, rank_of_share, rank_of_weights, ranks_of_spectra


@pytest.mark.parametrize("shape, most", [((4, 4), 1), ((6, 6), 2), ((10, 20), 6), ((1, 40), 0), ((2, 2), 0)])
def test_a_rank_saves_up_to_there(shape, most):
    assert most_rank(shape) == most
    assert count(shape, most) < count(shape, None) <= count(shape, most + 1)


def test_shares_round_down_and_leave_whole_what_would_grow():
    assert rank_of_share((100, 300), 0.299999999999999999) == 30
    assert rank_of_share((100, 300), 0.74) == 74 and rank_of_share((100, 300), 0.76) is None
    assert rank_of_weights((100, 300), 0.5) == 37 and count((100, 300), 37) <= 15000 < count((100, 300), 38)
    assert rank_of_weights((100, 300), 1.0) is None and rank_of_weights((100, 300), 0.0) == 1


def losses(shapes, spectra, ranks):
    return sum(0.0 if rank is None else float(e[rank:].sum()) for e, rank in zip(spectra, ranks, strict=True))


def lower_hull(points):
    """Corners of the lower convex hull, from the left."""
    hull = []
    for x, y in sorted(points):
        while len(hull) > 1:
            (a, fa), (b, fb) = hull[-2:]
            if (fb - fa) * (x - a) < (y - fa) * (b - a) - 1e-12:
                break
            hull.pop()
        if not hull or (y < hull[-1][1] and x > hull[-1][0]):
            hull.append((x, y))
    return hull


@pytest.mark.parametrize("seed", range(5))
def test_no_plan_is_better_at_the_corners_of_the_hull_of_all_plans(seed):
    random = torch.Generator().manual_seed(seed)
    shapes = [(6, 9), (8, 8), (5, 12)]
    spectra = [torch.rand(min(s), generator=random).double().pow(3).sort(descending=True).values for s in shapes]
    plans = list(itertools.product(*([*range(1, most_rank(s) + 1), None] for s in shapes)))
    costs = [sum(count(s, r) for s, r in zip(shapes, plan, strict=True)) for plan in plans]
    corners = lower_hull([(cost, losses(shapes, spectra, plan)) for cost, plan in zip(costs, plans, strict=True)])
    assert len(corners) > 4
    for budget, best in corners:
        assert losses(shapes, spectra, ranks_of_spectra(shapes, spectra, budget)) == pytest.approx(best, abs=1e-9)
    for budget in range(min(costs), max(costs) + 1):
        found = ranks_of_spectra(shapes, spectra, budget)
        assert sum(count(s, r) for s, r in zip(shapes, found, strict=True)) <= budget


def test_a_matrix_that_is_nearly_of_low_rank_gives_most():
    flat, steep = torch.ones(20), torch.logspace(0, -8, 20)
    shapes = [(20, 60)] * 2
    ranks = ranks_of_spectra(shapes, [flat, steep], 1200 + 600)
    assert ranks[0] is None and ranks[1] is not None and ranks[1] < 8


def test_equal_spectra_and_zeros():
    assert ranks_of_spectra([(20, 20)] * 3, [torch.zeros(20)] * 3, 3 * 40) == [1, 1, 1]
    ranks = ranks_of_spectra([(20, 20)] * 4, [torch.ones(20)] * 4, 1000)
    assert sum(count((20, 20), rank) for rank in ranks) <= 1000
