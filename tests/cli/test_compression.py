"""The one pipeline, by a step of our own: what is called on which model, and what is reported and saved."""

import shutil
from dataclasses import dataclass

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from examples.tiny_architectures import build as build_type
from hf_cod import LayerScores, find_decoder_layers, perplexity
from hf_cod.cli.compression import compress
from hf_cod.cli.main import main
from hf_cod.cli.samples import trained_on
from hf_cod.cli.settings import CompressionOutput, SpreadSettings
from hf_cod.cli.step import Step
from hf_cod.io.files import JsonFile
from hf_cod.io.models import load_model
from hf_cod.io.report import RunReport, environment, format_number
from hf_cod.io.settings import ModelSettings, TextSettings
from hf_cod.io.text import SampleSettings, token_batches
from tests.cli.runs import QUICK
from tests.tiny_models import build
from tests.tiny_tokenizers import gpt_like

TEXT = "one two three four five six seven eight nine ten " * 40


@dataclass(frozen=True)
class Factor(JsonFile):
    FIELD = "factor"

    factor: float


class Scaled(Step):
    """Multiplies the matrices of the layers that matter most, and notes on which norms of weights it was called."""

    command, done = "scale", "scaled"

    def __init__(self, settings, factor=0.5, refused=False):
        super().__init__(settings)
        self.factor, self.refused, self.calls = factor, refused, []

    def norm(self, work):
        return float(sum(W.norm() for i in range(4) for _, W in work.stack.matrices(i)))

    def check(self, work):
        if self.refused:
            raise ValueError("model: expected another one")

    def plan(self, work):
        self.calls.append(("plan", self.norm(work)))
        work.score("random")
        return None if self.factor == 1 else Factor(self.factor)

    def baselines(self, work, plan):
        return {"uniform": Factor(0.25)}

    def apply(self, work, plan):
        self.calls.append((plan.factor, self.norm(work)))
        with torch.no_grad():
            for index in range(4):
                for _, W in work.stack.matrices(index):
                    W.mul_(plan.factor)
        return RunReport("scale", work.name, {}, environment(), {}, {"factor": plan.factor}, ["Scaled."])

    def files(self, plan):
        return {"factor.json": plan}

    def measure(self, saved):
        norms = [float(sum(W.norm() for _, W in saved.matrices(i))) for i in range(4)]
        return {"norm": norms}, {"norms": sum(norms)}

    def told(self, plan):
        return {"by": "tests"}

    def last_words(self):
        return ["To load it, do nothing."]


@pytest.fixture
def folder(tmp_path):
    build("llama").save_pretrained(tmp_path / "model")
    gpt_like().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def run(folder, step_of=Scaled, scores=None, force=True, **more):
    settings = SpreadSettings(sequence_length=8, max_samples=4, eval_samples=5, batch_size=1, force=force)
    step, text = step_of(settings, **more), TextSettings(text=str(folder / "text.txt"))
    files = CompressionOutput(output=str(folder / "out"), plots=False, scores=scores)
    return step, compress(step, str(folder / "model"), ModelSettings(), text, files)


def test_what_is_saved_is_what_is_reported(folder, capsys):
    step, status = run(folder)
    assert status == 0
    intact = step.calls[0][1]
    assert [(name, pytest.approx(norm)) for name, norm in step.calls] == [
        ("plan", intact),
        (0.25, intact),
        (0.5, intact),
    ], "each on the intact model"
    report, out = RunReport.load(folder / "out"), folder / "out"
    model, tokenizer = load_model(str(out))
    assert {path.name for path in out.iterdir()} >= {"model.safetensors", "scores.json", "factor.json", "report.md"}
    assert not (out / "journal").exists() and Factor.load(out / "factor.json") == Factor(0.5)
    assert sum(report.layers["norm"]) == report.results["norms"] == pytest.approx(intact / 2)
    drawn = token_batches(tokenizer, TEXT, SampleSettings(sequence_length=8, max_samples=9, batch_size=1))
    found = report.results["perplexity"]
    assert list(found) == ["intact", "uniform", "scaled"] and len(set(found.values())) == 3
    assert found["scaled"] == pytest.approx(perplexity(model, drawn[4:]), rel=1e-5), "on samples not worked on"
    first = load_model(str(folder / "model"))[0]
    assert found["intact"] == pytest.approx(perplexity(first, drawn[4:]), rel=1e-5)


@pytest.mark.parametrize("trained", [None, "text.txt", "other.txt"])
def test_a_model_that_was_trained_on_the_text_has_a_note(trained, folder, capsys):
    """Its perplexity there is lower than on text that it does not know."""
    if trained is not None:
        (folder / "other.txt").write_text(TEXT)
        settings = {"text": str(folder / "." / trained)}
        RunReport("finetune", "m", settings, environment(), {}, {}).save(folder / "model")
    run(folder)
    notes = [note for note in RunReport.load(folder / "out").notes if "was trained on" in note]
    assert [note.partition(",")[0] for note in notes] == (
        ["the input model was trained on text.txt (finetune)"] if trained == "text.txt" else []
    )


def test_a_report_that_does_not_name_its_text_says_nothing_of_it(tmp_path):
    RunReport("heal", "m", {}, environment(), {}, {}).save(tmp_path)
    assert trained_on(str(tmp_path), TextSettings(), None) == []
    RunReport("heal", "m", {"text": None}, environment(), {}, {}).save(tmp_path)
    assert len(trained_on(str(tmp_path), TextSettings(), None)) == 1, "the embedded text"


def test_report_keys_and_the_order_of_its_sentences(folder, capsys):
    run(folder)
    report = RunReport.load(folder / "out")
    weights = (folder / "out" / "model.safetensors").stat().st_size
    assert report.results["disk_bytes"] == weights and report.results["factor"] == 0.5
    assert set(report.results["memory_bytes"]) == {"intact", "scaled"} and report.results["speed"] == {}
    assert report.results["evaluation"]["samples"] == 5 and report.settings["samples"] == 4
    scores = LayerScores.load(folder / "out" / "scores.json")
    assert report.layers["score"] == scores.values and report.results["score_settings"] == scores.settings
    assert report.settings["by"] == "tests" and report.settings["scores"] is None
    begins = [line.partition(" ")[0] for line in report.summary]
    assert (begins[0], begins[1], begins[2], begins[-1]) == ("Scaled.", "The", "Perplexity", "To")
    shown = capsys.readouterr().out.splitlines()
    assert [f"• {line}" for line in report.summary] == [line for line in shown if line.startswith("• ")]
    assert shown[-1] == f"written to {(folder / 'out').resolve()}"


def test_a_score_that_does_harm_gives_way_to_all_layers_alike(folder, capsys):
    forced = run(folder)[0]
    harmful = RunReport.load(folder / "out").results["perplexity"]
    assert (
        harmful["scaled"] > harmful["uniform"] and "the score is worse than a uniform plan" in capsys.readouterr().out
    )
    shutil.rmtree(folder / "out")
    step, status = run(folder, force=False)
    assert status == 0 and step.calls == [*forced.calls, (0.25, step.calls[0][1])], "on the intact model again"
    report = RunReport.load(folder / "out")
    found, fallback = report.results["perplexity"], report.results["fallback"]
    assert found["scaled"] == pytest.approx(found["uniform"]) and report.results["factor"] == 0.25
    assert fallback["score"] == report.settings["score"] == "random"
    assert fallback["perplexity"] == pytest.approx(harmful["scaled"]) and fallback["uniform"] == found["uniform"]
    assert Factor.load(folder / "out" / "factor.json") == Factor(0.25)
    (note,) = report.notes
    by_score, alike = (format_number(fallback[name]) for name in ("perplexity", "uniform"))
    assert note.startswith(f"score random had a higher perplexity ({by_score}) than a uniform plan ({alike})")
    assert "--force keeps the score" in note and "the lower of the two" in note
    shown = capsys.readouterr().out
    assert f"note: {note}" in shown and "the score is worse" not in shown
    assert note in (folder / "out" / "report.md").read_text(encoding="utf-8")


def test_a_score_that_does_no_harm_is_kept(folder):
    step, _ = run(folder, factor=0.25, force=False)
    assert [name for name, _ in step.calls] == ["plan", 0.25, 0.25]
    assert "fallback" not in RunReport.load(folder / "out").results


def test_given_scores_are_used(folder):
    sizes = [find_decoder_layers(build("llama")).count_weights(index) for index in range(4)]
    file = LayerScores("model", "mine", [4.0, 3.0, 2.0, 1.0], sizes).save(folder / "given.json")
    run(folder, scores=str(file))
    report = RunReport.load(folder / "out")
    assert report.layers["score"] == [4.0, 3.0, 2.0, 1.0] and report.settings["score"] == "mine"
    assert LayerScores.load(folder / "out" / "scores.json").method == "mine"


def test_a_plan_to_do_nothing_writes_no_model(folder, capsys):
    step, status = run(folder, factor=1)
    assert status == 0 and [name for name, _ in step.calls] == ["plan"]
    assert "no model was written" in capsys.readouterr().out and not (folder / "out" / "model.safetensors").exists()


def test_a_model_that_a_step_refuses_is_not_measured(folder, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("measured already")

    monkeypatch.setattr("transformers.LlamaForCausalLM.forward", never)
    with pytest.raises(ValueError, match="model: expected another one"):
        run(folder, refused=True)
    assert not (folder / "out").exists()


@pytest.mark.parametrize("command", ["quantize", "factorize", "narrow"])
def test_a_choice_of_modules_is_applied_recorded_and_part_of_the_run(command, checkpoint, capsys):
    if command == "quantize":
        pytest.importorskip("bitsandbytes")
    more = {
        "quantize": "--bits 3 --explain",
        "factorize": "--no-speed --no-baseline",
        "narrow": "--channel-multiple 8 --no-speed --no-baseline",
    }
    files = ["--text", str(checkpoint / "text.txt"), "--output", str(checkpoint / "out"), "--no-plots"]
    arguments = [command, str(checkpoint / "model"), *files, *QUICK, *more[command].split()]
    assert main([*arguments, "--exclude", "q_proj", "o_proj"]) == 0
    report = RunReport.load(checkpoint / "out")
    assert report.settings["exclude"] == ["q_proj", "o_proj"] and report.settings["include"] is None
    assert any("8 matrices" in note and "by exclude ['q_proj', 'o_proj']" in note for note in report.notes)
    old, new = (load_model(str(checkpoint / name))[0] for name in ("model", "out"))
    kept = {n: p for n, p in old.named_parameters() if "q_proj" in n or "o_proj" in n}
    assert len(kept) == 8 and all(torch.equal(new.get_parameter(name), p) for name, p in kept.items())
    changed = {n for n, p in old.named_parameters() if n not in kept and not _same(new, n, p)}
    assert any("down_proj" in name for name in changed)
    assert main([*arguments, "--exclude", "q_prj", "--output", str(checkpoint / "other")]) == 2
    assert "exclude: expected names of the layers' matrices, such as q_proj" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["narrow", "narrow --score angular", "drop-layers"])
def test_layers_that_share_keys_are_refused_before_anything_is_measured(command, checkpoint, capsys):
    build_type("gemma3n_text").save_pretrained(checkpoint / "model")
    first, *more = command.split()
    told = ["--text", str(checkpoint / "text.txt"), "--output", str(checkpoint / "out"), *QUICK, *more]
    capsys.readouterr()
    assert main([first, str(checkpoint / "model"), *told]) == 2
    shown = " ".join(capsys.readouterr().err.split())
    field, way = ("narrow", "") if first == "narrow" else ("layers", "; drop in Python removes layers that you name")
    assert f"error: {field}: expected layers with their own keys and values, got num_kv_shared_layers > 0{way}" in shown
    assert "perplexity" not in shown and "comparison" not in shown


@pytest.mark.parametrize(
    "command", ["prune --method magnitude", "narrow --channel-multiple 8 --no-speed", "quantize --bits 6.5"]
)
def test_a_classifier_has_no_perplexity_and_no_baselines_and_a_note_says_so(command, checkpoint, capsys):
    config = build("llama").config
    config.num_labels, config.pad_token_id = 3, 0
    AutoModelForSequenceClassification.from_config(config).save_pretrained(checkpoint / "model")
    first, *more = command.split()
    output = checkpoint / "out"
    told = [str(checkpoint / "model"), *more, "--text", str(checkpoint / "text.txt"), "--output", str(output)]
    assert main([first, *told, *QUICK, "--no-plots"]) == 0
    assert "for comparison" not in capsys.readouterr().out
    (note,) = [note for note in RunReport.load(output).notes if note.startswith("perplexity is not measured")]
    assert "LlamaForSequenceClassification is no language model; the plan by score was not compared with" in note


def _same(model, name, parameter):
    found = dict(model.named_parameters()).get(name)
    return found is not None and found.shape == parameter.shape and torch.equal(found, parameter)
