"""hf-cod narrow on a tiny model: what is written and refused."""

import re

import pytest

from hf_cod import LayerAllocation, perplexity
from hf_cod.cli.commands.narrow import NarrowOptions
from hf_cod.io.models import load_model
from hf_cod.io.report import RunReport, format_number
from hf_cod.io.text import SampleSettings, token_batches
from hf_cod.layers import unit_discovery
from tests.cli.runs import TEXT, narrow


@pytest.mark.parametrize("score", ["angular", "uniform"])
def test_narrow_writes_a_model_that_loads_and_a_report_of_it(checkpoint, capsys, score):
    source = {path.name: path.read_bytes() for path in (checkpoint / "model").iterdir()}
    more = ["--score", score, "--parameter-share", "0.6", "--eval-samples", "5", "--force"]
    more += ["--spread", "0.2"] if score == "angular" else []
    assert narrow(checkpoint, "out", *more) == 0
    names = {path.name for path in (checkpoint / "out").iterdir()}
    pictures = {"parameter_share.png", "share_of_heads.png", "share_of_channels.png", "error.png", "score.png"}
    assert {"model.safetensors", "scores.json", "allocation.json", "report.md", *pictures} <= names
    assert ("modeling_shaped.py" in names) == (score == "angular")
    assert "journal" not in names and {p.name: p.read_bytes() for p in (checkpoint / "model").iterdir()} == source
    page = (checkpoint / "out" / "report.md").read_text()
    assert "| layer | parameter share | share of heads | share of channels |" in page
    report, shown = RunReport.load(checkpoint / "out"), capsys.readouterr().out
    assert report.results["stock"] == (score == "uniform")
    assert ("transformers loads it without this package" in shown) == (score == "uniform")
    model, tokenizer = load_model(str(checkpoint / "out"))
    assert sum(p.numel() for p in model.parameters()) == report.results["parameters"]["narrowed"]
    found = report.results["perplexity"]
    assert ("uniform" in found) == (score == "angular")
    assert f"from {format_number(found['intact'])} to {format_number(found['narrowed'])}" in shown
    assert [*report.results["speed"]] == ["intact", "narrowed"] and "Tokens per second: " in shown
    drawn = token_batches(tokenizer, TEXT, SampleSettings(sequence_length=8, max_samples=9, batch_size=1))
    assert perplexity(model, drawn[4:]) == pytest.approx(found["narrowed"], rel=1e-5), "the later samples"
    assert narrow(checkpoint, "out") == 2
    assert "output: expected a new directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--parameter-share", "0.05"], "parameter_share: expected at least 0."),
        (["--parameter-share", "1.5"], "parameter_share: expected a share above 0 and at most 1, got 1.5"),
        (["--method", "luck"], "method: expected one of fluctuation, taylor, magnitude, got 'luck'"),
        (["--compensation", "luck"], "compensation: expected one of least_squares, bias, none, got 'luck'"),
        (["--score", "spectrum"], "score: expected one of"),
        (["--channel-multiple", "0"], "channel_multiple: expected a whole number above 0, got 0"),
    ],
)
def test_narrow_with_bad_input(checkpoint, capsys, arguments, message):
    assert narrow(checkpoint, "out", "--score", "uniform", *arguments) == 2
    shown = capsys.readouterr().err
    assert message in shown and "Traceback" not in shown


def test_layers_that_cannot_keep_as_little_keep_more_at_the_cost_of_others(checkpoint, capsys):
    """One group of heads and 32 channels are 0.6 of a layer; a plan that the user set is refused instead."""
    more = ["--score", "weight_norm", "--parameter-share", "0.62", "--channel-multiple", "32", "--force", "--no-plots"]
    assert narrow(checkpoint, "set", *more, "--spread", "0.08") == 2
    told = capsys.readouterr().err
    assert re.search(
        r"spread: expected a smaller one, or none, got 0.08: layer \d has to keep 0.6 of its weights", told
    )
    assert narrow(checkpoint, "out", *more) == 0
    plan = LayerAllocation.load(checkpoint / "out" / "allocation.json")
    assert min(plan.values) == pytest.approx(0.6) and plan.mean == pytest.approx(0.62)
    assert any("more is kept than by the score" in note for note in RunReport.load(checkpoint / "out").notes)


def test_the_default_score_never_lost_and_needs_a_loss(checkpoint):
    """auto; angular for a model without a head; the settings of owl mean owl."""
    assert NarrowOptions(threshold=7.0).score == "owl"
    load_model(str(checkpoint / "model"))[0].base_model.save_pretrained(checkpoint / "headless")
    more = ["--no-plots", "--no-speed", "--no-baseline"]
    assert narrow(checkpoint, "out", *more) == 0
    (checkpoint / "model" / "model.safetensors").unlink()
    for path in (checkpoint / "headless").iterdir():
        path.replace(checkpoint / "model" / path.name)
    assert narrow(checkpoint, "headless-out", *more) == 0
    found = {name: RunReport.load(checkpoint / name).settings["score"] for name in ("out", "headless-out")}
    assert found == {"out": "auto", "headless-out": "angular"}


def test_heads_and_channels_are_searched_for_once(checkpoint, monkeypatch):
    """Also for the baseline, and for the model that is loaded again after it."""
    measured, measure = [], unit_discovery.copy_layers
    monkeypatch.setattr(unit_discovery, "copy_layers", lambda *args: measured.append(True) or measure(*args))
    assert narrow(checkpoint, "out", "--score", "weight_norm", "--no-plots", "--no-speed") == 0
    assert "uniform" in RunReport.load(checkpoint / "out").results["perplexity"] and len(measured) == 1
