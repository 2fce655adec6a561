"""The card of a run of pre-training, and the directory that is shared with it."""

import json
import math

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_cod import RunReport
from hf_cod.analysis.monitoring.history import TrainingHistory
from hf_cod.cli.main import main
from hf_cod.io.models import embedded_model, load_model
from hf_cod.reporting.model_card import CardSettings, model_card, release
from tests.fresh_processes import run_fresh


@pytest.fixture
def run(tmp_path):
    """What examples/pretrain.py leaves, from the embedded LNS model."""
    folder = tmp_path / "run"
    model, tokenizer = load_model(embedded_model("lns"))
    model.float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = {"norm_placement": "lns", "steps": 7, "batch_size": 8, "sequence_length": 256, "learning_rate": 2e-3}
    results = {
        "curve": [[1, 8.0], [7, 4.0]],
        "validation": [[7, 4.5]],
        "tokens": 3_000_000,
        "parameters": {"trained": 3_386_496},
        "validation_perplexity": 64.8,
        "validation_tokens": 65_536,
        "effective_depth": {"value": 4.5, "low": 4.4, "high": 4.6, "confidence": 0.95},
        "late_share": 0.25,
    }
    layers = {"variance": [1.0, 3.25]}
    settings |= {"precision": "bf16", "seed": 0}
    RunReport("pretrain", "tiny lns", settings, {"torch": "2"}, layers, results, ["It learned."]).save(folder)
    history = TrainingHistory({"model": "m", "layers": 2, "settings": {}}, folder / "layer_diagnostics/history.jsonl")
    history.start()
    history.add({"step": 1, "variance": [1.0, 2.0], "effective_depth": 2.0})
    history.add({"step": 7, "variance": [1.0, 3.0], "effective_depth": 1.5})
    novel = {"package": "p", "license": "public domain", "evidence": "old", "pieces": 1, "characters": 9}
    (tmp_path / "sources.json").write_text(json.dumps({"seed": 0, "held_out": 0.02, "sources": {"novel": novel}}))
    (tmp_path / "comparison.md").write_text("| placement |\n|---|\n| lns |\n")
    return folder


@pytest.mark.process
def test_a_release_loads_without_this_package_and_its_card_holds_what_the_report_knows(run, tmp_path):
    released = tmp_path / "released"
    options = ["--name", "me/tiny-lns", "--license", "cc-by-sa-4.0", "--sources", str(tmp_path / "sources.json")]
    options += ["--comparison", str(tmp_path / "comparison.md")]
    assert main(["card", str(run), "--output", str(released), *options]) == 0
    card = ModelCard.load(released / "README.md")
    assert card.data.license == "cc-by-sa-4.0" and card.data.pipeline_tag == "text-generation"
    (figure,) = card.data.eval_results
    assert (figure.metric_type, figure.metric_value) == ("perplexity", 64.8)
    text = card.text
    for part in ("trust_remote_code=True", "hf-cod convert stock me/tiny-lns", "public domain", "4.5 (4.4 to 4.6)"):
        assert part in text, part
    assert "| lns |" in text and "It learned." in text and "1, 3.25" in text
    for picture in ("curve", "variance", "variance_by_step", "effective_depth_by_step"):
        assert f"]({picture}.png)" in text and (released / f"{picture}.png").is_file()
    original = AutoModelForCausalLM.from_pretrained(embedded_model("lns"))
    code = (
        "import sys, torch; sys.modules['hf_cod'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "assert model.dtype == torch.bfloat16\n"
        "print(model(torch.arange(9)[None]).logits.float().sum().item())\n"
    )
    done = run_fresh(code, released)
    assert done.returncode == 0, done.stderr[-2000:]
    with torch.no_grad():
        expected = original(torch.arange(9)[None]).logits.float().sum().item()
    assert float(done.stdout.splitlines()[-1]) == pytest.approx(expected, rel=1e-3)
    assert AutoTokenizer.from_pretrained(released).eos_token_id == 0


def test_card_says_what_cannot_be_folded_and_what_diverged(run):
    report = RunReport.load(run)
    report.settings["norm_placement"] = "post"
    assert "cannot be converted to a stock Llama" in model_card(report, CardSettings(), []).text
    report.layers.clear()
    report.results["validation_perplexity"] = math.inf
    report.notes.append("the run diverged; layers were not measured")
    assert "the run diverged" in model_card(report, CardSettings(), []).text


def test_what_can_be_folded_depends_on_the_family(run):
    """A stock OLMo 2 has its norms after the sublayers, so it represents `reordered` and not `lns`."""
    report = RunReport.load(run)
    assert "cannot be converted to a stock Olmo2" in model_card(report, CardSettings(), [], "cod_olmo2").text
    report.settings["norm_placement"] = "reordered"
    assert "hf-cod convert stock tiny-lns as-olmo2" in model_card(report, CardSettings(), [], "cod_olmo2").text
    assert "cannot be converted to a stock Llama" in model_card(report, CardSettings(), []).text
    with pytest.raises(ValueError, match=r"run: expected a model of type cod_llama, .*, got 'no_type'"):
        model_card(report, CardSettings(), [], "no_type")


def test_the_card_of_a_stock_model_asks_for_no_code(run):
    """Such as the mixture of examples/build_mixture.py: nothing to convert, nothing to trust, no paper of ours."""
    card = model_card(RunReport.load(run), CardSettings(), [], "qwen3_moe").text
    assert "A Qwen3Moe of 2 layers" in card and 'AutoModelForCausalLM.from_pretrained("tiny-lns")' in card
    assert not any(word in card for word in ("trust_remote_code", "convert stock", "Curse of Depth"))


def test_the_card_of_an_earlier_report_is_the_same(run):
    """In version 0.1 `parameters` was a number."""
    report = RunReport.load(run)
    card = model_card(report, CardSettings(), []).text
    report.results["parameters"] = report.results["parameters"]["trained"]
    assert model_card(report, CardSettings(), []).text == card and "3.4 million parameters" in card


def test_card_refuses(run, tmp_path):
    with pytest.raises(ValueError, match="report: expected a directory with a report"):
        release(tmp_path, tmp_path / "out")
    report = RunReport.load(run)
    with pytest.raises(ValueError, match=r"sources: expected a sources\.json"):
        model_card(report, CardSettings(sources=str(tmp_path / "none.json")), [])
    for content in ({"sources": [1]}, {"sources": {"novel": {"package": "p"}}}, [1], {}):
        (tmp_path / "damaged.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"sources: expected a sources\.json .*: .*expected .*, got "):
            model_card(report, CardSettings(sources=str(tmp_path / "damaged.json")), [])
    with pytest.raises(ValueError, match=r"comparison: expected a comparison\.md"):
        model_card(report, CardSettings(comparison=str(tmp_path / "none.md")), [])
    RunReport("diagnose", "m", {}, {}, {}, {}).save(tmp_path / "other")
    with pytest.raises(ValueError, match="run: expected a run of pre-training, got one of diagnose"):
        release(tmp_path / "other", tmp_path / "out")


@pytest.mark.parametrize(
    ("part", "name", "value", "told"),
    [
        ("results", "late_share", None, "late_share: expected a number beside effective_depth, got none"),
        ("results", "effective_depth", {"value": 1.0}, "effective_depth: expected value, low, high, .* got no low"),
        ("results", "effective_depth", {"value": True}, "effective_depth: expected"),
        ("layers", "variance", [], "layers: expected the variance among the measures, got variance"),
    ],
)
def test_a_report_without_what_the_card_says_is_refused(part, name, value, told, run):
    report = RunReport.load(run)
    getattr(report, part)[name] = value
    with pytest.raises(ValueError, match=told):
        model_card(report, CardSettings(), [])


@pytest.mark.parametrize(
    "file, text, told",
    [
        ("tokenizer.json", "{", "tokenizer: expected tokenizer files that transformers can read, got "),
        ("config.json", '{"architectures": 5}', "architectures: expected a list, got 5"),
        ("config.json", "[]", "model: expected named entries"),
    ],
)
def test_a_damaged_run_is_not_released(file, text, told, run, tmp_path):
    (run / file).write_text(text)
    with pytest.raises(ValueError, match=told):
        release(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_without_tokenizer_is_not_released(run, tmp_path):
    for path in run.glob("*token*"):
        path.unlink()
    with pytest.raises(ValueError, match="run: expected a model with a tokenizer, got none"):
        release(run, tmp_path / "out")


def test_a_users_files_in_the_output_stay(run, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "holiday.png").write_bytes(b"mine")
    release(run, out)
    card = release(run, out)  # over a card of ours
    assert 'from_pretrained("out", trust_remote_code=True)' in card.read_text(encoding="utf-8")
    assert (out / "holiday.png").read_bytes() == b"mine"
    (out / "README.md").write_bytes("à moi".encode("latin-1"))
    with pytest.raises(ValueError, match=r"output: expected no README\.md of other origin"):
        release(run, out)
    assert (out / "README.md").read_bytes() == "à moi".encode("latin-1")


@pytest.mark.parametrize(
    ("part", "name", "value", "told"),
    [
        ("results", "layer_drop", None, "results.layer_drop: expected"),
        ("results", "tokens", "many", "tokens: expected"),
        ("results", "validation_perplexity", None, "validation_perplexity: expected"),
        ("settings", "learning_rate", [1], "learning_rate: expected"),
        ("settings", "norm_placement", "](http://x)", "norm_placement: expected one of"),
    ],
)
def test_a_report_without_what_the_card_has_is_one_line(part, name, value, told, run, tmp_path):
    report = json.loads((run / "report.json").read_text())
    report[part] = {**report[part], name: value}
    if name == "layer_drop":  # a measure of which the results say nothing
        report["layers"][name] = report["layers"]["variance"]
    (run / "report.json").write_text(json.dumps(report))
    with pytest.raises(ValueError, match=told):
        release(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
