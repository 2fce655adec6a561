import pytest
import torch

from hf_cod import drop, repeat
from hf_cod.layers.removal.arranging import arrange, arranged, check_arranged
from tests.layers.removal.test_drop import output, snapshot
from tests.tiny_models import batch_for, build


@pytest.mark.parametrize("family", ["llama", "qwen2_moe", "gemma3"])
def test_an_order_that_leaves_out_and_repeats_is_drop_and_repeat_one_after_the_other(family):
    model, other, batch = build(family), build(family), batch_for(build(family))
    order = [0, 2, 3, 2, 3, 2, 3]
    before = snapshot(model)
    check_arranged(model, lambda stack: order, None)
    assert snapshot(model) == before
    drop(other, 1)
    repeat(other, 1, 3, times=3)
    with arranged(model, lambda stack: order, None):
        assert torch.equal(output(model, batch), output(other, batch))
    assert snapshot(model) == before
    assert arrange(model, lambda stack: order, None) == order
    assert torch.equal(output(model, batch), output(other, batch))
    after, wanted = model.config.to_dict(), other.config.to_dict()
    assert after == wanted
