from dataclasses import replace

import pytest
import torch

import hf_cod
from hf_cod import ExpertScores, LayerAllocation, OwlBnbConfig, find_decoder_layers, perplexity
from hf_cod.cli.commands.quantize import Quantize, QuantizeOptions
from hf_cod.cli.main import main
from hf_cod.io.models import embedded_model, load_model
from hf_cod.io.report import RunReport, format_number
from hf_cod.io.text import SampleSettings, TextSettings, load_texts, token_batches
from hf_cod.scoring.layer_scores import LayerScores
from tests.cli.runs import TEXT
from tests.compression.quantization.test_experts import mixture
from tests.fresh_processes import run_fresh
from tests.tiny_tokenizers import gpt_like

QUICK = ["--max-samples", "4", "--sequence-length", "64", "--batch-size", "2", "--eval-samples", "4"]


@pytest.fixture(scope="module")
def model():
    return embedded_model("pre")


def quantize(model, output, *more):
    return main(["quantize", model, "--output", str(output), *QUICK, *more])


def test_what_is_written_loads_and_its_report_is_true(model, tmp_path, capsys):
    assert quantize(model, tmp_path / "out", "--explain", "--force") == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {
        "model.safetensors",
        "scores.json",
        "allocation.json",
        "report.md",
        "bits.png",
        "error.png",
    } <= names and "journal" not in names
    report, shown = RunReport.load(tmp_path / "out"), capsys.readouterr().out
    saved, tokenizer = load_model(str(tmp_path / "out"))
    bits = saved.config.quantization_config.modules
    assert set(bits.values()) == {3, 4} and bits == report.results["module_bits"]
    assert "Four bits are assigned by owl, highest scores first" in shown and "stored bits per weight" in shown
    stack = find_decoder_layers(saved)
    order = sorted(range(len(stack)), key=lambda i: -report.layers["score"][i])
    fours = [sum(bits[name] == 4 for name in stack.linears(i)) for i in order]
    assert fours == sorted(fours, reverse=True) and report.layers["four"] == [fours[order.index(i)] for i in range(12)]
    stored = [p for n, p in saved.state_dict().items() if any(n.startswith(f"{name}.") for name in bits)]
    weights = sum(m.in_features * m.out_features for i in range(12) for m in stack.linears(i).values())
    measured = 8 * sum(t.numel() * t.element_size() for t in stored) / weights
    assert measured == pytest.approx(report.results["bits"], abs=1e-6) and measured == pytest.approx(3.5, abs=0.02)
    found = report.results["perplexity"]
    text = load_texts(TextSettings())
    drawn = token_batches(tokenizer, text, SampleSettings(sequence_length=64, max_samples=8, batch_size=2))
    assert perplexity(saved, drawn[2:]) == pytest.approx(found["quantized"], rel=1e-5), "the later samples"
    assert f"3 bits: {format_number(found['three'])}" in shown and set(found) == {
        "intact",
        "three",
        "four",
        "quantized",
    }
    memory = report.results["memory_bytes"]
    assert memory["quantized"] < memory["intact"]
    assert report.summary[-1] == "To load it, import hf_cod before from_pretrained."
    assert quantize(model, tmp_path / "out") == 2
    assert "output: expected a new directory" in capsys.readouterr().err


def test_the_allocation_that_is_written_serves_again(model, tmp_path):
    """The layer in which the budget ends has matrices of both widths."""
    more = ["--score", "random", "--rounding", "nearest", "--no-baseline", "--no-plots", "--skip", "k_proj"]
    assert quantize(model, tmp_path / "out", *more) == 0
    file = tmp_path / "out" / "allocation.json"
    plan, report = LayerAllocation.load(file), RunReport.load(tmp_path / "out")
    assert (plan.kind, plan.method) == ("bits", "random") and plan.parameters == report.layers["parameters"]
    between = [value for value in plan.values if value not in (3, 4)]
    assert len(between) == 1 and 3 < between[0] < 4 and plan.budget == pytest.approx(plan.mean)
    intact = load_model(model)[0]
    again = hf_cod.quantize(intact, OwlBnbConfig(allocation=file, skip=["k_proj"]))
    assert again.results["module_bits"] == report.results["module_bits"]
    saved = load_model(str(tmp_path / "out"))[0].state_dict()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in intact.state_dict().items())
    with pytest.raises(ValueError, match="allocation: expected those of a model with"):
        hf_cod.quantize(load_model(model)[0], OwlBnbConfig(allocation=replace(plan, sizes=[7] * 12)))


@pytest.mark.parametrize("rounding", ["weighted", "nearest"])
def test_one_width_by_each_rounding(model, tmp_path, rounding):
    assert quantize(model, tmp_path / "out", "--bits", "3", "--rounding", rounding, "--no-plots") == 0
    report = RunReport.load(tmp_path / "out")
    assert set(report.results["module_bits"].values()) == {3} and "score" not in report.layers
    assert set(report.results["perplexity"]) == {"intact", "quantized"} and report.settings["score"] is None
    assert LayerAllocation.load(tmp_path / "out" / "allocation.json").values == [3.0] * 12


def test_scores_are_read_and_some_names_are_left(model, tmp_path):
    LayerScores("m", "mine", [float(i) for i in range(12)], [197632] * 12).save(tmp_path / "scores.json")
    more = [
        "--scores",
        str(tmp_path / "scores.json"),
        "--skip",
        "o_proj",
        "--no-baseline",
        "--no-plots",
        "--block",
        "32",
    ]
    assert quantize(model, tmp_path / "out", *more) == 0
    report = RunReport.load(tmp_path / "out")
    bits = report.results["module_bits"]
    assert not any("o_proj" in name for name in bits) and bits["model.layers.11.mlp.up_proj"] == 4
    assert bits["model.layers.0.mlp.up_proj"] == 3 and report.settings["block"] == 32


@pytest.mark.process
def test_a_killed_run_goes_on_where_it_stopped(model, tmp_path):
    code = (
        "import sys, os\n"
        "from hf_cod.layers.sequential import FinishedLayers\n"
        "add, count = FinishedLayers.add, [0]\n"
        "def dies(self, index, note):\n"
        "    add(self, index, note)\n"
        "    count[0] += 1\n"
        "    if count[0] == 5: os._exit(9)\n"
        "FinishedLayers.add = dies\n"
        "from hf_cod.cli.main import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    more = ["--no-plots", "--no-baseline", "--output", str(tmp_path / "run")]
    killed = run_fresh(code, "quantize", model, *QUICK, *more)
    assert killed.returncode == 9 and len(list((tmp_path / "run" / "journal").glob("*.safetensors"))) == 5
    for name in ("run", "whole"):
        assert quantize(model, tmp_path / name, "--no-plots", "--no-baseline") == 0
    states = [load_model(str(tmp_path / name))[0].state_dict() for name in ("run", "whole")]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[1])
    reports = [RunReport.load(tmp_path / name) for name in ("run", "whole")]
    assert reports[0].layers == reports[1].layers and reports[0].results == reports[1].results


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--bits", "2"], "bits: expected 3, 4, or stored bits between them, such as 3.5, got 2"),
        (
            ["--bits", "3.1", "--no-baseline"],
            "from 3.13 to 4.13 (more with rows whose length is not a multiple of 64), got 3.1",
        ),
        (["--score", "best"], "score: expected one of owl"),
        (["--rounding", "up"], "rounding: expected one of compensated, weighted, nearest, got"),
        (["--scores", "none.json"], "scores: expected a file"),
        (["--sequence-length", "300000"], "at least one sample"),
    ],
)
def test_bad_input(model, tmp_path, capsys, arguments, message):
    try:
        status = quantize(model, tmp_path / "out", *arguments)
    except SystemExit as stop:  # argparse's own way
        status = stop.code
    shown = capsys.readouterr().err
    assert status == 2 and message in shown and "Traceback" not in shown


def test_three_bits_replace_a_mixture_that_is_worse(model, tmp_path, capsys, monkeypatch):
    """The perplexities are made up; everything else is real."""
    more = ["--score", "depth", "--rounding", "nearest", "--no-plots"]
    bits = {}
    for name, given in {"fallback": [], "forced": ["--force"]}.items():
        found = iter([50.0, 60.0, 55.0, 70.0, 60.0] if not given else [50.0, 60.0, 55.0, 70.0])
        monkeypatch.setattr("hf_cod.cli.work.Work.perplexity", lambda work, found=found: next(found))
        assert quantize(model, tmp_path / name, *more, *given) == 0
        report, shown = RunReport.load(tmp_path / name), " ".join(capsys.readouterr().out.split())
        saved = load_model(str(tmp_path / name))[0]
        bits[name] = set(saved.config.quantization_config.modules.values())
        assert next(found, None) is None and bits[name] == set(report.results["module_bits"].values())
        assert ("fallback" in report.results) == ("score depth had a higher perplexity" in shown) == (not given)
        assert ("All layers have 3 bits" in shown) == (not given)
        assert ("3 bits for all layers (--bits 3) are better" in shown) == bool(given)
    assert bits == {"fallback": {3}, "forced": {3, 4}}
    report = RunReport.load(tmp_path / "fallback")
    plan = LayerAllocation.load(tmp_path / "fallback" / "allocation.json")
    assert report.results["fallback"] == {"score": "depth", "perplexity": 70.0, "uniform": 60.0}
    assert (plan.values, plan.budget, plan.method) == ([3.0] * 12, 3.0, "uniform")


def test_the_note_on_three_bits_names_both_scores(tmp_path, capsys, monkeypatch):
    mixture().save_pretrained(tmp_path / "model")
    gpt_like().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    found = iter([50.0, 60.0, 55.0, 70.0, 60.0])
    monkeypatch.setattr("hf_cod.cli.work.Work.perplexity", lambda work: next(found))
    text = ["--text", str(tmp_path / "text.txt"), "--no-plots", "--bits", "3.6", "--block", "32"]
    text += ["--sequence-length", "8", "--eval-samples", "5", "--rounding", "nearest", "--score", "depth"]
    assert quantize(str(tmp_path / "model"), tmp_path / "out", *text, "--experts", "reap") == 0
    report, shown = RunReport.load(tmp_path / "out"), " ".join(capsys.readouterr().out.split())
    told = "score depth of layers with score reap of experts had a higher perplexity (70) than 3 bits for all layers"
    assert told in shown and "--force keeps the scores" in shown
    assert report.results["fallback"] == {"score": "depth", "experts": "reap", "perplexity": 70.0, "uniform": 60.0}


def test_version_0_1_and_a_run_without_force_have_one_identity():
    identities = [Quantize(QuantizeOptions(force=force)).identity() for force in (False, True)]
    assert "force" not in identities[0] and identities[1] == {**identities[0], "force": True}


def test_the_default_score_follows_the_rounding():
    found = {name: QuantizeOptions(rounding=name).score for name in ("compensated", "weighted", "nearest")}
    assert found == {"compensated": "owl", "weighted": "angular", "nearest": "angular"}
    assert QuantizeOptions(rounding="nearest", threshold=7.0).score == "owl"


def test_bits_that_no_mixture_has_are_refused_before_anything_is_measured(model, tmp_path, capsys, monkeypatch):
    def forward(self, input_ids, **rest):
        if tuple(input_ids.shape) not in ((1, 8), (1, 40)):
            pytest.fail("measured already")
        raise RuntimeError("a few tokens, to find out what forward does, are no measurement")

    monkeypatch.setattr("transformers.LlamaForCausalLM.forward", forward)
    assert quantize(model, tmp_path / "out", "--bits", "4.6") == 2
    assert "bits: expected 3, 4, or 3.2" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_experts_get_bits_by_their_own_scores(tmp_path, capsys):
    """The same command on a mixture; its reload is measured by the command itself."""
    mixture().save_pretrained(tmp_path / "model")
    gpt_like().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    text = ["--text", str(tmp_path / "text.txt"), "--no-plots", "--no-baseline", "--bits", "3.6", "--block", "32"]
    text += ["--sequence-length", "8", "--eval-samples", "5"]
    assert quantize(str(tmp_path / "model"), tmp_path / "out", *text, "--experts", "frequency", "--explain") == 0
    report, scores = RunReport.load(tmp_path / "out"), ExpertScores.load(tmp_path / "out" / "expert_scores.json")
    assert report.results["bits"] == pytest.approx(3.6, abs=0.02)
    assert report.settings["experts"] == "frequency" and scores.method == "frequency"
    bits = {name: digits for name, digits in report.results["module_bits"].items() if name.endswith("down_proj")}
    assert len(bits) == 4 and any(isinstance(digits, str) for digits in bits.values())
    shown = " ".join(capsys.readouterr().out.split())
    assert "to what all tokens enter first, then to experts by frequency" in shown and "of 4 experts)" in shown
    assert quantize(str(tmp_path / "model"), tmp_path / "reap", *text, "--granularity", "expert") == 0
    assert ExpertScores.load(tmp_path / "reap" / "expert_scores.json").method == "reap"
    assert quantize(str(tmp_path / "model"), tmp_path / "no", *text, "--experts", "size") == 2
    assert quantize(str(tmp_path / "model"), tmp_path / "no", *text, "--bits", "3", "--experts", "reap") == 2
    assert "experts: expected none with bits 3, which uses no scores, got reap" in capsys.readouterr().err


def test_matrices_get_bits_by_their_own_scores(model, tmp_path):
    more = ("--granularity", "module", "--score", "owl", "--no-baseline")
    assert quantize(model, tmp_path / "out", *more) == 0
    plan = LayerAllocation.load(tmp_path / "out" / "allocation.json")
    assert RunReport.load(tmp_path / "out").results["module_bits"] == plan.modules
    assert {*plan.modules.values()} == {3, 4} and plan.granularity == "module"


def test_a_search_gives_bits_to_matrices(model, tmp_path, capsys):
    more = ("--granularity", "module", "--search", "--search-passes", "40", "--no-baseline")
    assert quantize(model, tmp_path / "out", *more) == 0
    plan, report = LayerAllocation.load(tmp_path / "out" / "allocation.json"), RunReport.load(tmp_path / "out")
    assert report.results["module_bits"] == plan.modules and report.results["search"] == plan.search
    assert report.settings["score"] == "search" and 3.4 < report.results["bits"] <= 3.5
    assert quantize(model, tmp_path / "no", "--search", "--bits", "3") == 2
    assert "search: expected bits between 3 and 4, got 3" in capsys.readouterr().err


def test_factors_of_experts_are_quantized(tmp_path):
    model = mixture()
    hf_cod.factorize(model, 0.6, "plain", expert_basis="shared")
    model.save_pretrained(tmp_path / "model")
    gpt_like().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    text = ["--text", str(tmp_path / "text.txt"), "--no-plots", "--no-baseline", "--bits", "3", "--block", "32"]
    text += ["--sequence-length", "8", "--eval-samples", "5"]
    assert quantize(str(tmp_path / "model"), tmp_path / "out", *text) == 0
    bits = RunReport.load(tmp_path / "out").results["module_bits"]
    assert {f"model.layers.3.mlp.experts.down_proj.{part}" for part in ("reduce", "expand")} <= bits.keys()
