"""A training that makes the model worse is noted."""

import math

import pytest

from hf_cod.training.runs.harm import harm_of_training


@pytest.mark.parametrize(("before", "after"), [(94.0, 93.0), (94.0, 94.0), (94.0, 94.001), (math.nan, 3.0)])
def test_no_note(before, after):
    assert harm_of_training(before, after, 0.5) == []


@pytest.mark.parametrize(("after", "shown"), [(27009.2, "27,009"), (math.inf, "inf"), (math.nan, "NaN")])
def test_a_note_names_the_way_out(after, shown):
    (note,) = harm_of_training(94.0, after, 0.5)
    assert note == (
        f"the training raised the perplexity from 94 to {shown}: use a lower learning rate than 0.5 (--learning-rate) "
        "or fewer steps"
    )
