import math

import pytest
import torch

from hf_cod.functional.lost_energy import expected_loss, lost_by_bits, lost_by_sparsity

COUNT = 100_000
# The values of a normal distribution at equidistant shares, in rising order.
NORMAL = math.sqrt(2) * torch.special.erfinv((2 * torch.arange(COUNT, dtype=torch.float64) + 1) / COUNT - 1)


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.7, 0.99, 1.0])
def test_zeros_lose_the_energy_of_the_smallest_weights(sparsity):
    smallest = NORMAL.abs().sort().values[: round(sparsity * COUNT)]
    naive = float(smallest.square().sum() / NORMAL.square().sum())
    assert float(lost_by_sparsity(torch.tensor(sparsity))) == pytest.approx(naive, abs=2e-3)


@pytest.mark.parametrize("bits", [3, 4])
def test_bits_lose_what_the_best_codebook_loses(bits):
    """Lloyd's algorithm; the formula is the limit for many bits, and above it for few."""
    codes = torch.linspace(-2.5, 2.5, 2**bits, dtype=torch.float64)
    for _ in range(300):
        place = torch.bucketize(NORMAL, (codes[1:] + codes[:-1]) / 2)
        codes = torch.zeros_like(codes).index_add(0, place, NORMAL) / torch.bincount(place, minlength=len(codes))
    naive = float((NORMAL - codes[place]).square().sum() / NORMAL.square().sum())
    found = float(lost_by_bits(torch.tensor(float(bits))))
    assert naive < found < 1.3 * naive
    assert float(lost_by_bits(torch.tensor(0.0))) == 1


def test_the_expected_loss_of_one_removed_layer_is_the_measured_one():
    without = torch.tensor([5.0, 3.5, math.nan])
    assert expected_loss(3.0, without, torch.tensor([0.0, 1.0, 0.0])) == 3.5
    assert expected_loss(3.0, without, torch.tensor([0.5, 0.5, 0.0])) == pytest.approx(3 + 1 + 0.25)
    assert math.isnan(expected_loss(3.0, without, torch.tensor([0.0, 0.0, 0.1])))
