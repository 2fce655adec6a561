"""Layers of one model in another, against models that are put together."""

import copy
import json
import math

import pytest
import torch

from hf_cod import RunReport, find_decoder_layers, measure_swap
from hf_cod.io.models import embedded_model, load_model
from tests import references
from tests.tiny_models import batch_for, build


def other_model(family):
    """The same architecture with other weights in every layer."""
    model = copy.deepcopy(build(family))
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))) * 0.05)
    return model


def loss_with(model, donor, layers, batch):
    mixed = copy.deepcopy(model)
    stack, other = find_decoder_layers(mixed), find_decoder_layers(copy.deepcopy(donor))
    for layer in layers:
        stack.module_list[layer] = other[layer]
    return math.log(references.perplexity(mixed, batch))


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_losses_against_models_that_are_put_together(family, tmp_path):
    model, donor = build(family), other_model(family)
    batch = batch_for(model, "left")
    weights = [{n: t.clone() for n, t in each.state_dict().items()} for each in (model, donor)]
    modules = [[id(m) for m in each.modules()] for each in (model, donor)]
    donor.train()
    report = measure_swap(model, donor, batches=[batch], output=tmp_path)
    assert donor.training and not model.training
    assert [[id(m) for m in each.modules()] for each in (model, donor)] == modules
    for each, before in zip((model, donor), weights, strict=True):
        assert all(torch.equal(tensor, before[name]) for name, tensor in each.state_dict().items())
    donor.eval()
    found, L = report.results["swap"], 4
    assert found["intact"] == pytest.approx(loss_with(model, donor, [], batch), rel=1e-6)
    assert found["donor"] == pytest.approx(math.log(references.perplexity(donor, batch)), rel=1e-6)
    assert found["all"] == found["bottom"][-1] == pytest.approx(loss_with(model, donor, range(L), batch), rel=1e-6)
    for layer in range(L):
        expected = {"single": [layer], "bottom": range(layer + 1), "top": range(layer, L)}
        for part, layers in expected.items():
            assert found[part][layer] == pytest.approx(loss_with(model, donor, layers, batch), rel=1e-6), (part, layer)
            assert report.layers[f"swap_{part}"][layer] == pytest.approx(found[part][layer] - found["intact"])
    assert RunReport.load(tmp_path) == report
    report.plot(tmp_path)
    assert (tmp_path / "swap.png").is_file() and json.loads((tmp_path / "report.json").read_text())["kind"] == "swap"


def test_a_model_with_the_layers_of_its_copy_stays_as_it_is():
    model = build("llama")
    report = measure_swap(model, copy.deepcopy(model), batches=[batch_for(model)])
    assert all(value == pytest.approx(0, abs=1e-6) for values in report.layers.values() for value in values)


def test_a_finished_swap_is_not_measured_again(tmp_path):
    model, donor = build("llama"), other_model("llama")
    first = measure_swap(model, donor, batches=[batch_for(model)], output=tmp_path)
    lines = (tmp_path / "journal.jsonl").read_text().splitlines()
    # Killed in the middle: what was measured by then is kept.
    (tmp_path / "journal.jsonl").write_text("\n".join([*lines[:8], ""]))
    again = measure_swap(model, donor, batches=[batch_for(model)], output=tmp_path)
    assert again.results == first.results
    assert sorted((tmp_path / "journal.jsonl").read_text().splitlines()) == sorted(lines)
    assert measure_swap(donor, model, batches=[batch_for(model)], output=tmp_path).results != first.results


def test_what_cannot_be_swapped_is_refused():
    model = build("llama")
    batches = [batch_for(model)]
    wrong = {
        "equally many layers, got 4 and 3": build("llama", 3),
        "equal shapes, got mlp.gate_proj.weight of shape .64, 32. in the place of .48, 32. in layer 0": build(
            "llama", intermediate_size=64
        ),
        "GPT2Block in the place of LlamaDecoderLayer in layer 0": build("gpt2"),
        "one dtype on one device, got torch.float32 on cpu and torch.bfloat16 on cpu": build("llama").bfloat16(),
        "two models, got one model twice": model,
    }
    for message, donor in wrong.items():
        with pytest.raises(ValueError, match=f"^swap: expected .*{message}$"):
            measure_swap(model, donor, batches=batches)


def test_the_embedded_pair_can_be_swapped_with_a_note():
    """Its layers have equal shapes; LNS scales by a factor of the layer, which travels with it. Two trainings from one
    start have little in common."""
    (pre, tokenizer), (lns, _) = (load_model(str(embedded_model(name))) for name in ("pre", "lns"))
    texts = ["It is a truth universally acknowledged, that a single man must be in want of a wife. " * 20]
    report = measure_swap(pre, lns, tokenizer=tokenizer, texts=texts, sequence_length=32, max_samples=2)
    assert any("differ in norm_placement" in note for note in report.notes)
    found = report.results["swap"]
    assert max(report.layers["swap_single"]) > 1 and found["all"] > found["donor"] + 1
