import json

import pytest
import torch
from accelerate import disk_offload
from transformers import CONFIG_MAPPING, AutoModel

from examples.tiny_architectures import tiny_config
from hf_cod import find_decoder_layers, skip
from hf_cod.analysis.diagnostics.layer_drop import measure_layer_drop
from hf_cod.analysis.evaluation.choice import find_metric, perplexity
from hf_cod.io.journal import Journal
from tests import references
from tests.tiny_models import CAUSAL, FAMILIES, batch_for, build, two_batches


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("family", CAUSAL)
def test_perplexity_without_each_layer_against_the_formula(family, padding):
    model = build(family)
    batch = batch_for(model, padding)
    intact, without = measure_layer_drop(model, [batch], find_metric(None, "causal_lm"))
    assert intact == pytest.approx(references.perplexity(model, batch), rel=1e-6)
    for i, value in enumerate(without):
        assert value == pytest.approx(references.perplexity(references.without_layer(model, i), batch), rel=1e-6)


@pytest.mark.parametrize("family", ["bert_headless", "dinov2"])
def test_angle_of_the_output_for_models_without_a_head(family):
    model = build(family)
    batch = batch_for(model)
    intact, without = measure_layer_drop(model, [batch], find_metric(None, "headless"))
    assert intact == pytest.approx(0, abs=1e-7)
    with torch.no_grad():
        base = model(**batch).last_hidden_state.double()
        for i, value in enumerate(without):
            other = references.without_layer(model, i)(**batch).last_hidden_state.double()
            angles = [references.angle(a, b) for a, b in zip(base.flatten(0, 1), other.flatten(0, 1), strict=True)]
            assert value == pytest.approx(sum(angles) / len(angles), abs=1e-6)


@pytest.mark.parametrize("tower", ["text", "vision"])
def test_angle_of_one_of_two_towers(tower):
    """Over all patches, also where a text has as many tokens and some of them are padding."""
    torch.manual_seed(0)
    model = AutoModel.from_config(tiny_config("vision-language/clip")).eval()
    ids = torch.randint(3, 90, (3, 5), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    batch = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}
    intact, without = measure_layer_drop(model, [batch], find_metric(None, "headless"), layers_path=tower)
    real = mask.flatten().bool() if tower == "text" else torch.ones(15, dtype=torch.bool)

    @torch.no_grad()
    def hidden():
        return model(**batch)[f"{tower}_model_output"].last_hidden_state.double().flatten(0, 1)[real]

    base = hidden()
    assert intact == pytest.approx(0, abs=1e-7)
    for i, value in enumerate(without):
        with skip(model, i, tower):
            angles = [references.angle(a, b) for a, b in zip(base, hidden(), strict=True)]
        assert value == pytest.approx(sum(angles) / len(angles), abs=1e-6) and value > 1e-3
    assert not model.text_model._forward_hooks and not model.vision_model._forward_hooks


def test_labels_and_callables():
    model = build("vit")
    batch = {**batch_for(model), "labels": torch.tensor([0, 2, 1])}

    def margin(outputs, batch):
        return outputs.logits.amax(-1)

    for metric, expected in ((None, "accuracy"), (margin, "margin")):
        metric = find_metric(metric, "classes")
        assert metric.name == expected
        intact, without = measure_layer_drop(model, [batch], metric)
        with torch.no_grad():
            score = {
                "accuracy": lambda o: float((o.logits.argmax(-1) == batch["labels"]).float().mean()),
                "margin": lambda o: float(o.logits.amax(-1).mean()),
            }[expected]
            assert intact == pytest.approx(score(model(pixel_values=batch["pixel_values"])))
            for i, value in enumerate(without):
                other = references.without_layer(model, i)
                assert value == pytest.approx(score(other(pixel_values=batch["pixel_values"])), abs=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_comes_back_untouched(family):
    model = build(family).train()
    batch = batch_for(model)
    layers = list(find_decoder_layers(model))
    metric = find_metric(lambda outputs, batch: outputs[0].flatten(1).float().mean(1), "labels")
    measure_layer_drop(model, [batch], metric)
    assert list(find_decoder_layers(model)) == layers and model.training
    assert not any(layer._forward_hooks for layer in layers)


def test_one_layer_and_bfloat16():
    model = build("llama", layers=1, dtype=torch.bfloat16)
    batch = batch_for(model)
    intact, without = measure_layer_drop(model, [batch], find_metric(None, "causal_lm"))
    assert intact == pytest.approx(references.perplexity(model, batch), rel=1e-5)
    assert without == pytest.approx([references.perplexity(references.without_layer(model, 0), batch)], rel=1e-5)


def test_offloaded_to_disk(tmp_path):
    model = build("llama")
    batch = batch_for(model)
    metric = find_metric(None, "causal_lm")
    expected = measure_layer_drop(model, [batch], metric)
    disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    assert measure_layer_drop(model, [batch], metric) == expected


def test_same_as_skip():
    model = build("gpt2")
    batch = batch_for(model)
    _, without = measure_layer_drop(model, [batch], find_metric(None, "causal_lm"))
    for i, value in enumerate(without):
        with skip(model, i):
            assert perplexity(model, [batch]) == pytest.approx(value, rel=1e-6)


class Fragile:
    """Perplexity that fails at its n-th batch and layer, and counts its calls."""

    lower_is_better, compares, name, identity = True, False, "fragile", "fragile"

    def __init__(self, fails_at):
        self.fails_at, self.calls, self.inner = fails_at, 0, find_metric(None, "causal_lm")

    def rows(self, outputs, batch, intact):
        self.calls += 1
        if self.calls == self.fails_at:
            raise RuntimeError("out of luck")
        return self.inner.rows(outputs, batch, intact)

    def value(self, rows):
        return self.inner.value(rows)


@pytest.mark.parametrize("fails_at", [1, 3, 6, 9, 10])
def test_an_interrupted_sweep_goes_on_where_it_stopped(fails_at, tmp_path):
    model = build("llama")
    batches = [batch_for(model), batch_for(model, "right")]  # 2 x (1 + 4) evaluations
    expected = measure_layer_drop(model, batches, Fragile(None))
    with pytest.raises(ValueError, match=r"metric: fragile failed on batch .* out of luck"):
        measure_layer_drop(model, batches, Fragile(fails_at), Journal(tmp_path / "journal.jsonl", "same"))
    resumed = Journal(tmp_path / "journal.jsonl", "same")
    done = len(resumed.entries)
    assert done == fails_at - 1
    metric = Fragile(None)
    assert measure_layer_drop(model, batches, metric, resumed) == expected
    # At most the intact run of the batch that was cut off is evaluated once more.
    assert 10 - done <= metric.calls <= 10 - done + 1


def test_a_journal_of_other_work_or_a_cut_line_is_not_trusted(tmp_path):
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, "one")
    journal.add("drop 0 -1", [[1.0, 2.0]])
    with path.open("a") as file:
        file.write('["one", "drop 0 0", [[1.0')
    assert Journal(path, "one").entries == {"drop 0 -1": [[1.0, 2.0]]}
    assert [json.loads(line)[:3] for line in path.read_text().splitlines()] == [["one", "drop 0 -1", [[1.0, 2.0]]]]
    other = Journal(path, "two")
    assert other.entries == {}
    other.add("drop 0 -1", [[3.0, 4.0]])
    assert Journal(path, "one").entries == {"drop 0 -1": [[1.0, 2.0]]}, "other work is kept"


def test_layers_that_return_more_than_the_hidden_state():
    model = AutoModel.from_config(
        CONFIG_MAPPING["deberta-v2"](
            vocab_size=99, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=3
        )
    ).eval()
    batch = batch_for(model)
    _, without = measure_layer_drop(model, [batch], find_metric(None, "headless"))
    assert all(0 < value < 1 for value in without)


def test_shared_keys_and_values_are_refused():
    model = build("llama")
    model.config.num_kv_shared_layers = 2
    with pytest.raises(ValueError, match="expected layers with their own keys and values"):
        measure_layer_drop(model, [batch_for(model)], find_metric(None, "causal_lm"))


@pytest.mark.parametrize("layer", range(4))
def test_broken_activations_name_the_first_layer(layer):
    model = build("llama")
    with torch.no_grad():
        model.model.layers[layer].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=f"first in the output of layer {layer}, batch 0"):
        measure_layer_drop(model, [batch_for(model)], find_metric(None, "causal_lm"))


def test_a_metric_that_fails_at_the_end_is_told():
    metric = Fragile(None)
    metric.value = lambda rows: 1 / 0
    with pytest.raises(ValueError, match="metric: fragile failed with the intact model: division by zero"):
        measure_layer_drop(build("llama"), [batch_for(build("llama"))], metric)


def test_an_error_without_text_is_named_by_its_type():
    def silent(outputs, batch):
        raise AttributeError

    model = build("llama")
    with pytest.raises(ValueError, match=r"failed on batch 0 with the intact model: AttributeError$"):
        measure_layer_drop(model, two_batches(model), find_metric(silent, "causal_lm"))
