"""hf-cod score: statistics and scores, and what of them is kept."""

import json
import re
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model

from hf_cod import ExpertScores
from hf_cod.analysis.statistics import layer_statistics
from hf_cod.cli.main import main
from hf_cod.io.report import RunReport
from hf_cod.scoring import methods
from hf_cod.scoring.layer_scores import LayerScores
from hf_cod.scoring.settings import EXPERT_METHODS
from tests.cli.runs import QUICK
from tests.tiny_models import build
from tests.tiny_tokenizers import gpt_like


def test_score_writes_statistics_scores_report_and_picture(checkpoint, capsys):
    text, first, second = (str(checkpoint / name) for name in ("text.txt", "first", "second"))
    arguments = ["score", str(checkpoint / "model"), "--text", text, *QUICK]
    assert main([*arguments, "--threshold", "3", "--output", first]) == 0
    names = {path.name for path in (checkpoint / "first").iterdir()}
    files = {"statistics.safetensors", "scores.json", "report.json", "report.md", "score.png"}
    assert files <= names and "overview.png" not in names
    shown = capsys.readouterr().out
    assert re.search(
        r"By owl, layers \d \(.*\), \d \(.*\) matter most, layers .* matter least", " ".join(shown.split())
    )
    scores = LayerScores.load(checkpoint / "first" / "scores.json")
    assert RunReport.load(first).layers["score"] == scores.values and scores.settings["threshold"] == 3
    earlier = str(checkpoint / "first" / "statistics.safetensors")
    more = ["--statistics", earlier, "--threshold", "3", "--no-plots", "--output", second]
    assert main([*arguments, *more]) == 0
    assert LayerScores.load(checkpoint / "second" / "scores.json") == scores
    assert main([*arguments, "--method", "angular", "--output", second]) == 0
    assert (checkpoint / "second" / "earlier-1" / "scores.json").is_file()
    assert main([*arguments, "--method", "best"]) == 2
    assert main([*arguments, "--statistics", text]) == 2
    assert main([*arguments, "--statistics", earlier, "--method", "angular", "--output", f"{second}-3"]) == 2
    shown = capsys.readouterr().err
    assert "method: expected one of owl" in shown and "statistics: expected a file" in shown
    assert "statistics: expected none with method angular, which does not use them, got" in shown
    assert not (checkpoint / "second-3").exists(), "what nobody checked is not copied"


def test_scores_of_an_adapter_have_its_name(checkpoint, capsys, caplog):
    adapter = checkpoint / "tuned"
    get_peft_model(build("llama"), LoraConfig(target_modules=["q_proj"])).save_pretrained(adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(checkpoint / "model")
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    output = str(checkpoint / "out")
    assert main(["score", str(adapter), "--text", str(checkpoint / "text.txt"), *QUICK, "--output", output]) == 0
    assert "used on" not in caplog.text + capsys.readouterr().err
    assert RunReport.load(output).model == Path(LayerScores.load(f"{output}/scores.json").model).name == "tuned"


def test_importance_matrices_are_written_and_read(checkpoint, capsys):
    text, first, second = (str(checkpoint / name) for name in ("text.txt", "first", "second"))
    arguments = ["score", str(checkpoint / "model"), "--text", text, *QUICK, "--no-plots"]
    assert main([*arguments, "--imatrix", "--output", first]) == 0
    file = checkpoint / "first" / "imatrix.gguf"
    assert main([*arguments, "--statistics", str(file), "--output", second]) == 0
    values = [LayerScores.load(checkpoint / name / "scores.json").values for name in ("first", "second")]
    assert values[0] == values[1]
    assert main([*arguments, "--threshold", "3", "--output", first]) == 0
    assert not file.exists() and (checkpoint / "first" / "earlier-1" / "imatrix.gguf").is_file()
    bad = checkpoint / "bad.gguf"
    bad.write_bytes(b"GGUF" + bytes(8))
    assert main([*arguments, "--statistics", str(bad), "--output", f"{second}-3"]) == 2
    assert "statistics: expected GGUF version 2 or 3, little-endian, got 0 in" in capsys.readouterr().err
    build("opt").save_pretrained(checkpoint / "opt")
    gpt_like().save_pretrained(checkpoint / "opt")
    other = ["score", str(checkpoint / "opt"), *arguments[2:], "--imatrix", "--output", f"{second}-3"]
    assert main(other) == 2, "before statistics are collected"
    assert "model: expected an architecture that GGUF has names for, got opt" in capsys.readouterr().err
    assert not (checkpoint / "second-3" / "statistics.safetensors").exists()


@pytest.mark.parametrize(
    "layers, method, found",
    [
        (1, "owl", r"By owl, no layer stands out\."),
        (3, "owl", r"By owl, layer (\d) \(.*\) matters most, layer (?!\1)\d \(.*\) matters least\."),
        (
            5,
            "random",
            r"By random, layers (\d) .*, (\d) .* matter most, layers (?!\1|\2)\d .*, (?!\1|\2)\d .* matter least",
        ),
        (4, "uniform", r"By uniform, no layer stands out\."),
    ],
)
def test_no_layer_matters_both_most_and_least(checkpoint, layers, method, found):
    build("llama", layers).save_pretrained(checkpoint / "model")
    arguments = ["score", str(checkpoint / "model"), "--text", str(checkpoint / "text.txt"), *QUICK, "--no-plots"]
    assert main([*arguments, "--method", method, "--output", str(checkpoint / "out")]) == 0
    assert re.match(found, RunReport.load(checkpoint / "out").summary[0])


def test_score_takes_the_statistics_that_are_there(checkpoint, monkeypatch):
    """Those of an interrupted run, and those of another score; never those of other samples or a changed file."""
    counted, collect = [], layer_statistics.collect_statistics
    monkeypatch.setattr(layer_statistics, "collect_statistics", lambda *a, **k: counted.append(1) or collect(*a, **k))
    out = checkpoint / "out"
    arguments = ["score", str(checkpoint / "model"), "--text", str(checkpoint / "text.txt"), "--output", str(out)]
    arguments += [*QUICK, "--no-plots"]
    with monkeypatch.context() as patch:
        patch.setattr(methods, "score_layers", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(arguments)
    assert main(arguments) == 0 and len(counted) == 1
    first = RunReport.load(out).layers["score"]
    assert main([*arguments, "--threshold", "3"]) == 0 and len(counted) == 1
    assert len((out / "journal.jsonl").read_text().splitlines()) == 1
    assert RunReport.load(out / "earlier-1").layers["score"] == first != RunReport.load(out).layers["score"]
    assert main([*arguments, "--threshold", "3", "--seed", "1"]) == 0 and len(counted) == 2
    assert main(arguments) == 0 and len(counted) == 3, "the file holds other samples' statistics now"


@pytest.fixture
def mixture(checkpoint):
    build("mixtral").save_pretrained(checkpoint / "mixture")
    gpt_like().save_pretrained(checkpoint / "mixture")
    return ["score", str(checkpoint / "mixture"), "--text", str(checkpoint / "text.txt"), *QUICK]


@pytest.mark.parametrize("method", EXPERT_METHODS)
def test_experts_are_scored_beside_the_layers(mixture, checkpoint, method):
    out = checkpoint / "out"
    assert main([*mixture, "--experts", method, "--plot-format", "svg", "--output", str(out)]) == 0
    files = {"statistics.safetensors", "scores.json", "expert_scores.json", "score.svg", "expert_scores.svg"}
    assert files <= {path.name for path in out.iterdir()}
    scores, report = ExpertScores.load(out / "expert_scores.json"), RunReport.load(out)
    assert scores.method == method and list(scores.layers.values()) == [0, 1, 2, 3]
    assert report.results["expert_scores"]["values"] == scores.values
    assert re.match(r"16 experts are scored by .*; \d+ of them received no token\.", report.summary[-1])
    assert "Score of each expert" in (out / "expert_scores.svg").read_text()


def test_scores_of_experts_that_are_earlier_are_kept(mixture, checkpoint):
    out = checkpoint / "out"
    arguments = [*mixture, "--no-plots", "--output", str(out)]
    assert main([*arguments, "--experts", "owl", "--threshold", "2"]) == 0
    first = ExpertScores.load(out / "expert_scores.json")
    assert first.settings == {"threshold": 2.0}
    assert main([*arguments, "--experts", "frequency"]) == 0
    assert ExpertScores.load(out / "earlier-1" / "expert_scores.json") == first
    assert ExpertScores.load(out / "expert_scores.json").method == "frequency"
    assert main(arguments) == 0
    assert not (out / "expert_scores.json").exists() and "expert_scores" not in RunReport.load(out).results


def test_threshold_is_of_either_method(mixture, checkpoint, capsys):
    out = ["--no-plots", "--output", str(checkpoint / "out")]
    assert main([*mixture, "--method", "uniform", "--experts", "owl", "--threshold", "3", *out]) == 0
    assert main([*mixture, "--method", "uniform", "--experts", "reap", "--threshold", "3", *out]) == 2
    assert "threshold: expected none with method uniform, which does not use it" in capsys.readouterr().err


def test_a_model_without_experts_is_refused_before_the_work(checkpoint, capsys):
    out = checkpoint / "out"
    arguments = ["score", str(checkpoint / "model"), "--text", str(checkpoint / "text.txt"), *QUICK, "--no-plots"]
    assert main([*arguments, "--experts", "reap", "--output", str(out)]) == 2
    assert "model: expected a mixture of experts, got" in capsys.readouterr().err
    assert not (out / "statistics.safetensors").exists()
