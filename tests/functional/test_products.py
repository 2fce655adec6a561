import pytest
import torch

from hf_cod.functional.products import output_energy


def test_it_is_the_energy_of_the_outputs():
    W, X = torch.randn(5, 7, dtype=torch.float64), torch.randn(40, 7, dtype=torch.float64)
    energy = sum(float(torch.dot(w, x)) ** 2 for w in W for x in X)
    assert output_energy(W, X.mT @ X) == pytest.approx(energy, rel=1e-12)
    assert output_energy(W, torch.zeros(7, 7, dtype=torch.float64)) == 0
