"""Sums of products of the inputs: exact whatever inputs matrices share, in all passes, in some or in none."""

import pytest
import torch
from torch import nn

from hf_cod import factorize
from hf_cod.analysis.statistics.input_products import MomentsRecorder, ProductsRecorder
from hf_cod.layers.stack import find_decoder_layers
from tests.tiny_models import batch_for, build, outputs

WIDTH = 32
X, Y, Z = torch.randn(3, 2, 5, WIDTH, generator=torch.Generator().manual_seed(0))
NAMES = ("q_proj", "k_proj", "v_proj")
# Matrix and input of each call, for each of three passes.
PASSES = {
    "one input": [[("q_proj", X), ("k_proj", X), ("v_proj", X)]] * 3,
    "an input each": [[("q_proj", X), ("k_proj", Y), ("v_proj", Z)]] * 3,
    "called again with another input": [[("q_proj", X), ("k_proj", X), ("v_proj", X), ("v_proj", Y)]] * 3,
    "no longer together": [[("q_proj", X), ("k_proj", X)], [("q_proj", X), ("k_proj", Y)], [("k_proj", Z)]],
    "together later": [[("q_proj", X), ("k_proj", Y)], [("q_proj", X), ("k_proj", X), ("v_proj", X)], [("v_proj", Z)]],
    "first with another": [[("q_proj", X), ("k_proj", X), ("v_proj", Y)], [("q_proj", X), ("v_proj", X)], []],
    "others first": [[("q_proj", X), ("k_proj", X), ("v_proj", X)], [("v_proj", Y)], [("v_proj", Z), ("q_proj", Z)]],
    "not in one pass": [[("q_proj", X), ("k_proj", X), ("v_proj", X)], [("q_proj", Y), ("v_proj", Y)], []],
}


def attention():
    model = build("llama", layers=1)
    return find_decoder_layers(model), model.model.layers[0].self_attn


@pytest.mark.parametrize("kind", [ProductsRecorder, MomentsRecorder])
@pytest.mark.parametrize("case", PASSES)
def test_sums_are_those_of_each_call(case, kind):
    stack, module = attention()
    names = {name: f"model.layers.0.self_attn.{name}" for name in NAMES}
    recorder = kind(stack, [0], [names["k_proj"], names["v_proj"]]) if kind is MomentsRecorder else kind(stack, [0])
    with recorder.attached(), torch.no_grad():
        for number, calls in enumerate(PASSES[case]):
            recorder.start({})
            for name, x in calls:
                getattr(module, name)(x)
            recorder.finish(number)
    for name in NAMES if kind is ProductsRecorder else NAMES[1:]:
        read = [x.flatten(0, 1) for calls in PASSES[case] for called, x in calls if called == name]
        found = recorder.of(names[name])
        if not read:
            assert found is None
            continue
        rows = torch.cat(read)
        if kind is MomentsRecorder:
            rows = torch.cat([rows, torch.ones(len(rows), 1)], 1).double()
        torch.testing.assert_close(found, rows.mT @ rows, rtol=1e-5, atol=1e-4)


def test_an_input_that_was_changed_in_place_is_another_one():
    stack, module = attention()
    recorder, x = ProductsRecorder(stack, [0]), X.clone()
    with recorder.attached(), torch.no_grad():
        recorder.start({})
        module.q_proj(x)
        module.k_proj(x.mul_(2))
        recorder.finish(0)
    q, k = (recorder.of(f"model.layers.0.self_attn.{name}") for name in NAMES[:2])
    torch.testing.assert_close(k, 4 * q, rtol=1e-5, atol=1e-4)


def test_a_model_that_calls_a_matrix_twice():
    """As Zaya, whose delayed values begin with those of zeros."""
    model = build("llama", layers=2)
    attention = model.model.layers[0].self_attn
    own = attention.forward

    def forward(hidden_states, **options):
        out = own(hidden_states, **options)
        nn.Module.__call__(attention.v_proj, hidden_states.new_zeros(len(hidden_states), 1, WIDTH))
        return out

    attention.forward = forward
    batches = [{"input_ids": batch_for(model)["input_ids"]}] * 2
    factorize(model, 0.8, batches=batches)
    assert outputs(model, batches[0]).isfinite().all()
