"""Layers without which a model cannot be run have no figure; the others keep theirs."""

import math

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForMaskedLM

from hf_cod import RunReport, allocate, compare, diagnose, find_decoder_layers, plan_depth, score_layers, skip
from hf_cod.analysis.diagnostics import drop_results
from hf_cod.analysis.evaluation.choice import find_metric
from hf_cod.compression.depth.removal_probe import RemovalProbe
from hf_cod.layers.task import task_of

SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}


def convolved():
    """DeBERTa-v2 with a convolution between its first two layers, and samples."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING["deberta-v2"](**SIZES, num_hidden_layers=4, conv_kernel_size=3, initializer_range=0.3)
    ids = torch.arange(1, 61).reshape(10, 6)
    return AutoModelForMaskedLM.from_config(config).eval(), [{"input_ids": ids, "labels": ids.flip(0)}]


def test_a_first_layer_that_cannot_be_removed(tmp_path):
    model, batches = convolved()
    report = diagnose(model, batches=batches, show_progress=False, output=tmp_path)
    drop = report.results["layer_drop"]
    assert drop["without"][0] is None and report.layers["layer_drop"][0] is None
    assert report.results["intervals"]["layer_drop"][0] == [None, None]
    for layer in (1, 2, 3):
        with skip(model, layer):
            alone = diagnose(model, metrics=["layer_drop"], batches=batches, show_progress=False)
        assert drop["without"][layer] == pytest.approx(alone.results["layer_drop"]["intact"], rel=1e-5, abs=1e-6)
        low, high = report.results["intervals"]["layer_drop"][layer]
        assert low <= drop["without"][layer] <= high
    (note,) = [note for note in report.notes if note.startswith("layer_drop of layer 0 was left out")]
    with pytest.raises(ValueError) as refused, skip(model, 0):
        pass
    assert note.endswith(f"because skip does not remove it: {str(refused.value)!r}")
    assert any(each.startswith("None of the measured removals is harmful") for each in report.summary)
    rows = {row[0]: row[1] for row in compare([report, report]).rows}
    assert rows["worst removal of one layer"].endswith(f"({drop['metric']}, of the measured ones)")
    assert not rows["metric of the intact model"].endswith("of the measured ones)")
    assert RunReport.load(tmp_path) == report
    assert "| 0 |" in report.to_markdown() and "layer_drop" in report.to_html()
    report.plot(tmp_path)


def test_the_reason_is_asked_for_once(monkeypatch):
    model, batches = convolved()
    asked = []
    monkeypatch.setattr(drop_results, "why_not_skipped", lambda stack, layer: asked.append(layer) or "no: because")
    report = diagnose(model, metrics=["layer_drop"], batches=[*batches, *batches], show_progress=False)
    assert asked == [0] and report.layers["layer_drop"][0] is None


def test_a_block_of_layers_that_the_model_counts_otherwise():
    """Funnel pools before the first layer of its second block."""
    torch.manual_seed(0)
    shape = {"vocab_size": 64, "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 32, "block_sizes": [2, 2]}
    model = AutoModelForMaskedLM.from_config(CONFIG_MAPPING["funnel"](**shape)).eval()
    batches = [{"input_ids": torch.arange(1, 49).reshape(6, 8)}]
    path = "funnel.encoder.blocks.1"
    report = diagnose(model, metrics=["layer_drop"], batches=batches, layers_path=path, show_progress=False)
    first, second = report.layers["layer_drop"]
    assert first is None and math.isfinite(second)
    refused = pytest.raises(ValueError, match=r"^layers: expected kept layers that the config of Funnel")
    with refused, skip(model, 0, path):
        pass
    assert list(model.config.block_sizes) == [2, 2] and len(find_decoder_layers(model, path)) == 2


def test_scores_take_it_for_the_one_that_matters_most(caplog):
    model, batches = convolved()
    scores = score_layers(model, method="layer_drop", batches=batches)
    assert scores.values[0] == max(scores.values[1:]) and scores.settings["not_removable"] == [0]
    assert "layer_drop: layers 0 get the largest score of the others" in caplog.text
    plan = allocate(scores, "parameter_share", 0.8)
    assert plan.values[0] == max(plan.values)


def test_the_convolution_after_the_first_layer_counts_in_each_removal():
    model, batches = convolved()
    with torch.no_grad():
        intact = model(**batches[0]).loss
        plan = plan_depth(model, 1, "layer_drop", batches=batches, protect=False)
        assert plan.costs[0] is None
        for layer in (1, 2, 3):
            with skip(model, layer):
                assert plan.costs[layer] == pytest.approx(float(model(**batches[0]).loss - intact), abs=1e-4)
        sets = [(1,), (1, 2), (1, 3), (2, 3), (1, 2, 3)]
        metric = find_metric(None, task_of(model, batches))
        losses = RemovalProbe(find_decoder_layers(model), metric, batches).losses(sets)
        for layers, loss in zip(sets, losses, strict=True):
            with skip(model, layers):
                assert loss == pytest.approx(float(model(**batches[0]).loss), abs=1e-4)
