"""Every knob of `fit` on the trained mixture of experts: expected and counted sizes, and those of the written files."""

import math
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from hf_cod import apply_steps, drop, perplexity, plan_fit
from hf_cod.compression.fit.knobs import KNOBS, left_out
from hf_cod.io.models import load_model
from hf_cod.io.text import embedded_text, split_samples, token_batches
from hf_cod.layers.size import size_of
from hf_cod.layers.stack import find_decoder_layers
from tests.real_models import MIXTURE


def make(depth=4):
    """The first layers of it."""
    model = load_model(MIXTURE)[0]
    drop(model, range(depth, 7))
    return model


@pytest.fixture(scope="module")
def texts():
    batches = token_batches(load_model(MIXTURE)[1], embedded_text(), sequence_length=64, max_samples=12, batch_size=4)
    return split_samples(batches, 8)


def tensor_bytes(directory):
    """Bytes of the tensors in the files of a checkpoint, without their headers and the markers of a format."""
    total = 0
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            total += sum(file.get_tensor(name).nbytes for name in file.keys() if not name.startswith("hf_cod"))  # noqa: SIM118
    return total


STEPS = [
    {"depth": 1.0},
    {"experts": 3.0},
    {"width": 0.22},
    {"rank": 0.28},
    {"bits": 3.5},
    {"experts": 2.0, "width": 0.1, "rank": 0.2},
    {"depth": 1.0, "experts": 2.0, "width": 0.2, "bits": 3.2},
]


@pytest.mark.parametrize("steps", STEPS, ids=lambda steps: "-".join(steps))
def test_expected_counted_and_written_sizes(steps, texts, tmp_path):
    model, intact = make(), make()
    stack, before = find_decoder_layers(intact), size_of(intact)
    expected = math.prod(KNOBS[knob].left(stack, level) for knob, level in steps.items())
    apply_steps(model, steps, batches=texts[0])
    size = size_of(model)
    padded = 0.02 if {"width", "bits"} <= steps.keys() else 0.006  # to whole blocks of scales
    assert size.layer_bytes / before.layer_bytes == pytest.approx(expected, abs=padded)
    if "bits" not in steps:
        assert size.layer_weights / before.layer_weights == pytest.approx(expected, abs=0.006)
    model.save_pretrained(tmp_path)
    unsaved = sum(t.nbytes for name, t in model.named_buffers() if name not in model.state_dict())
    assert tensor_bytes(tmp_path) == size.bytes - unsaved
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert size_of(again) == size
    assert torch.equal(again.eval()(**texts[1][0]).logits, model.eval()(**texts[1][0]).logits)


def test_a_plan_for_bits_of_all_weights(texts, monkeypatch):
    """Stored bits count experts: a plan of three bits is no plan for attention alone."""
    for knob, found in {"experts": [2.0], "bits": [3.0]}.items():
        monkeypatch.setitem(KNOBS, knob, replace(KNOBS[knob], levels=lambda *_, found=found: found))
    plan = plan_fit(lambda: make(2), "bits", 3.0, *texts, knobs=["experts", "bits"], n_verified=1)
    model, intact = make(2), make(2)
    apply_steps(model, plan.steps, batches=texts[0])
    assert {*plan.steps} == {"experts", "bits"}
    assert 2.4 < 8 * size_of(model).layer_bytes / size_of(intact).layer_weights <= 3
    assert math.log(perplexity(model, texts[1])) == pytest.approx(plan.loss, abs=1e-4)


def test_zeros_of_banks_are_not_packed(texts):
    stack = find_decoder_layers(make())
    told = "expected Linears, which are packed without their zeros, got banks of experts with 89% of the weights"
    notes = left_out([*KNOBS], stack, named=False)
    assert notes.keys() == {"sparsity"} and told in notes["sparsity"]
    with pytest.raises(ValueError, match=told):
        plan_fit(make, "memory", 3e6, *texts, knobs=["sparsity", "rank"])
