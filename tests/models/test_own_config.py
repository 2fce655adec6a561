"""What is changed about one model is never told of another one that was built from the same config object."""

import pytest
import torch

from hf_cod import (
    LayerAllocation,
    OwlBnbConfig,
    drop,
    drop_layers,
    factorize,
    narrow,
    pack_sparse,
    prune,
    quantize,
    repeat,
)
from tests.tiny_models import build, outputs, two_batches

UNEQUAL = LayerAllocation("parameter_share", 0.6, [0.4, 0.8, 0.4, 0.8], [1] * 4, "mine")


def packs(model):
    prune(model, 0.7, "magnitude")
    pack_sparse(model)


CHANGES = {
    "factorize": lambda model: factorize(model, 0.6, "plain"),
    "narrow, stock": lambda model: narrow(model, 0.6, "magnitude", "none", channel_multiple=8),
    "narrow, shaped": lambda model: narrow(model, UNEQUAL, "magnitude", "none", channel_multiple=8),
    "drop": lambda model: drop(model, [1]),
    "repeat": lambda model: repeat(model, 1, 2),
    "drop_layers": lambda model: drop_layers(model, [1, 2], "linear", batches=two_batches(model)),
    "pack_sparse": packs,
    "quantize": lambda model: quantize(model, OwlBnbConfig(bits=4)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_model_of_the_same_config_is_left_as_it_was(change, tmp_path):
    model = build("llama")
    config = model.config
    teacher = type(model)(config).eval()
    told, kind, expected = config.to_dict(), type(config), outputs(teacher)
    CHANGES[change](model)
    assert teacher.config is config and type(config) is kind and config.to_dict() == told
    assert torch.equal(outputs(teacher), expected)
    assert model.config.to_dict() != told
    inside = [m.config for m in model.modules() if hasattr(m, "config")]
    assert len(inside) > 5 and all(found is model.config for found in inside)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(outputs(type(model).from_pretrained(tmp_path)), outputs(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("change", ["drop", "drop_layers"])
def test_a_part_tells_the_whole(change, tmp_path):
    model = build("llama")
    CHANGES[change](model.model)
    assert model.config is model.model.config
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(outputs(type(model).from_pretrained(tmp_path)), outputs(model), rtol=1e-4, atol=1e-5)
