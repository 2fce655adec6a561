"""What the mixture of a distillation loss may be."""

import math

import pytest

from hf_cod.functional.mixture import check_mixture


@pytest.mark.parametrize("temperature, share", [(1e-3, 0), (1, 1), (20, 0.5)])
def test_what_may_be_mixed(temperature, share):
    check_mixture(temperature, share)


@pytest.mark.parametrize(
    "temperature, share, message",
    [
        (0, 0.5, "temperature: expected a number above 0, got 0"),
        (math.inf, 0.5, "temperature: expected a number above 0, got inf"),
        (math.nan, 0.5, "temperature: expected a number above 0, got nan"),
        (1, -0.1, r"label_weight: expected a share in 0\.\.1, got -0\.1"),
        (1, 1.1, r"label_weight: expected a share in 0\.\.1, got 1\.1"),
    ],
)
def test_what_may_not(temperature, share, message):
    with pytest.raises(ValueError, match=message):
        check_mixture(temperature, share)
