"""Errors of repetitions are in words of repetitions, those of removals in words of removals."""

import pytest

from examples.tiny_architectures import build
from hf_cod.layers.removal.drop import check_drop
from hf_cod.layers.removal.repeat import check_repeat
from hf_cod.layers.removal.wording import REMOVAL, REPETITION, wording_of


def test_an_order_says_what_is_done():
    assert wording_of([0, 2, 3]) is REMOVAL and wording_of([0, 1, 1, 2]) is REPETITION


@pytest.mark.parametrize("kind, removed, way", [("jamba", 1, "whole periods"), ("diffllama", 1, "lambda_init")])
def test_both_say_what_is_possible_and_what_else_to_use(kind, removed, way):
    model = build(kind)
    with pytest.raises(ValueError, match=rf"^layers: expected kept layers that .*{way}.* use skip$") as error:
        check_drop(model, removed)
    assert "repeat" not in str(error.value)
    with pytest.raises(ValueError, match=rf"^layers: expected layers that .*{way}.* use repeated$") as error:
        check_repeat(model, 1, 2)
    assert "remove" not in str(error.value) and "kept" not in str(error.value)
