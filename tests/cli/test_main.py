import re
import shutil

import pytest
import torch

from hf_cod import LayerAllocation, find_decoder_layers, perplexity
from hf_cod.analysis.statistics import layer_statistics
from hf_cod.cli.main import COMMANDS, main
from hf_cod.io.models import load_model
from hf_cod.io.report import RunReport, format_number
from hf_cod.io.text import SampleSettings, token_batches
from hf_cod.scoring import methods
from hf_cod.scoring.layer_scores import LayerScores
from hf_cod.scoring.methods import score_layers
from tests.fresh_processes import run_fresh
from tests.tiny_models import build
from tests.tiny_tokenizers import gpt_like

TEXT = "one two three four five six seven eight nine ten " * 40
QUICK = ["--sequence-length", "8", "--max-samples", "4", "--batch-size", "2"]


@pytest.fixture
def checkpoint(tmp_path):
    build("llama").save_pretrained(tmp_path / "model")
    gpt_like().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def diagnose(folder, *more):
    return main(
        [
            "diagnose",
            str(folder / "model"),
            "--text",
            str(folder / "text.txt"),
            "--output",
            str(folder / "run"),
            *QUICK,
            *more,
        ]
    )


def test_diagnose_writes_report_and_pictures(checkpoint, capsys):
    assert diagnose(checkpoint) == 0
    names = {path.name for path in (checkpoint / "run").iterdir()}
    assert {"report.json", "report.md", "overview.png", "angular_distance.png", "layer_drop.png"} <= names
    shown = capsys.readouterr().out
    assert "Effective depth" in shown and "gradient" in shown


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
    shown = capsys.readouterr().err
    assert "method: expected one of owl" in shown and "statistics: expected a file" in shown


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
    assert RunReport.load(out / "earlier-1").layers["score"] == first != RunReport.load(out).layers["score"]
    assert main([*arguments, "--threshold", "3", "--seed", "1"]) == 0 and len(counted) == 2
    assert main(arguments) == 0 and len(counted) == 3, "the file holds other samples' statistics now"


def prune(folder, output, *more):
    arguments = ["prune", str(folder / "model"), "--text", str(folder / "text.txt"), "--output", str(folder / output)]
    return main([*arguments, *QUICK, *more])


def test_prune_writes_a_model_that_loads_and_a_report_of_it(checkpoint, capsys):
    source = {path.name: path.read_bytes() for path in (checkpoint / "model").iterdir()}
    assert prune(checkpoint, "out", "--sparsity", "0.7", "--spread", "0.1", "--eval-samples", "5") == 0
    names = {path.name for path in (checkpoint / "out").iterdir()}
    assert {"model.safetensors", "scores.json", "allocation.json", "report.md", "sparsity.png", "score.png"} <= names
    assert "journal" not in names and {p.name: p.read_bytes() for p in (checkpoint / "model").iterdir()} == source
    report, shown = RunReport.load(checkpoint / "out"), capsys.readouterr().out
    model, tokenizer = load_model(str(checkpoint / "out"))
    stack = find_decoder_layers(model)
    zeros = [sum(int((W == 0).sum()) for _, W in stack.matrices(i)) for i in range(4)]
    assert report.layers["sparsity"] == [n / stack.count_weights(0) for n in zeros]
    assert sum(zeros) / 4 / stack.count_weights(0) == pytest.approx(0.7, abs=1e-3)
    assert max(report.layers["sparsity"]) <= 0.8 + 1e-3 and min(report.layers["sparsity"]) >= 0.6 - 1e-3
    found = report.results["perplexity"]
    assert f"from {format_number(found['intact'])} to {format_number(found['pruned'])} (all layers alike:" in shown
    drawn = token_batches(tokenizer, TEXT, SampleSettings(sequence_length=8, max_samples=9, batch_size=1))
    assert perplexity(model, drawn[4:]) == pytest.approx(found["pruned"], rel=1e-5), "the later samples"
    assert report.settings["samples"] == 4 and report.results["evaluation"]["samples"] == 5
    assert prune(checkpoint, "out") == 2
    assert "output: expected a new directory" in capsys.readouterr().err


@pytest.mark.parametrize("pattern, kept", [("2:4", {4}), ("N:8", {2, 3, 4, 5, 6})])
def test_prune_by_pattern_and_by_earlier_scores(checkpoint, pattern, kept):
    sizes = score_layers(load_model(str(checkpoint / "model"))[0], method="uniform").parameters
    LayerScores("m", "mine", [1.0, 2.0, 3.0, 4.0], sizes).save(checkpoint / "scores.json")
    more = [] if pattern == "2:4" else ["--spread", "0.25", "--scores", str(checkpoint / "scores.json")]
    assert prune(checkpoint, "out", "--pattern", pattern, "--method", "magnitude", "--no-baseline", *more) == 0
    stack = find_decoder_layers(load_model(str(checkpoint / "out"))[0])
    for i in range(4):
        counts = {int(n) for _, W in stack.matrices(i) for n in (W != 0).view(-1, 8).sum(-1).unique()}
        assert len(counts) == 1 and counts <= kept
    assert "uniform" not in RunReport.load(checkpoint / "out").results["perplexity"]


def test_auto_says_what_it_chose(checkpoint, capsys):
    arguments = ["score", str(checkpoint / "model"), "--text", str(checkpoint / "text.txt"), *QUICK, "--no-plots"]
    assert main([*arguments, "--method", "auto", "--target", "0.6", "--output", str(checkpoint / "scored")]) == 0
    scores = LayerScores.load(checkpoint / "scored" / "scores.json")
    assert scores.settings["target"] == 0.6 and scores.remarks[0] in capsys.readouterr().out
    assert prune(checkpoint, "out", "--score", "auto", "--sparsity", "0.6", "--no-plots") == 0
    assert "auto chose" in capsys.readouterr().out
    plan = LayerAllocation.load(checkpoint / "out" / "allocation.json")
    width = LayerScores.load(checkpoint / "out" / "scores.json").settings["spread"]
    assert max(abs(value - 0.6) for value in plan.values) <= width + 1e-9


def test_prune_and_recover(checkpoint, capsys):
    more = ["--score", "uniform", "--recover", "20", "--recover-learning-rate", "0.01", "--no-plots"]
    assert prune(checkpoint, "out", *more) == 0
    report = RunReport.load(checkpoint / "out")
    found = report.results["perplexity"]
    assert found["recovered"] < found["pruned"] and report.results["sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert "by recovery to" in capsys.readouterr().out
    assert prune(checkpoint, "other", "--recover", "-1") == 2


@pytest.mark.process
def test_a_killed_pruning_goes_on_where_it_stopped(checkpoint):
    code = (
        "import sys, os\n"
        "from hf_cod.layers.sequential import FinishedLayers\n"
        "add, count = FinishedLayers.add, [0]\n"
        "def dies(self, index, unseen):\n"
        "    add(self, index, unseen)\n"
        "    count[0] += 1\n"
        "    if count[0] == 6: os._exit(9)\n"
        "FinishedLayers.add = dies\n"
        "from hf_cod.cli.main import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    arguments = ["prune", str(checkpoint / "model"), "--text", str(checkpoint / "text.txt"), *QUICK, "--no-plots"]
    killed = run_fresh(code, *arguments, "--output", checkpoint / "run")
    assert killed.returncode == 9
    kept = {path.name: path.stat().st_mtime_ns for path in (checkpoint / "run" / "journal").glob("*.safetensors")}
    assert len(kept) == 6, "four layers pruned alike, two of the plan"
    assert prune(checkpoint, "run", "--no-plots") == 0 and prune(checkpoint, "whole", "--no-plots") == 0
    weights = [(checkpoint / name / "model.safetensors").read_bytes() for name in ("run", "whole")]
    assert weights[0] == weights[1]
    resumed, whole = (RunReport.load(checkpoint / name) for name in ("run", "whole"))
    assert resumed.layers == whole.layers and resumed.results == whole.results


def test_prune_never_writes_into_a_directory_of_something_else(checkpoint, capsys):
    for name, file in (("model2", "model.safetensors"), ("notes/journal", "2024.txt"), ("mixed/journal", "a/b")):
        path = checkpoint / name / file
        path.parent.mkdir(parents=True)
        path.write_text("precious")
        assert prune(checkpoint, name.split("/")[0]) == 2
        assert "output: expected a new directory, an empty one" in capsys.readouterr().err
        assert path.read_text() == "precious" and [p for p in path.parent.iterdir()] == [path]
    (checkpoint / "empty").mkdir()
    assert prune(checkpoint, "empty", "--score", "uniform", "--no-plots") == 0
    assert {p.name for p in checkpoint.iterdir() if p.name.startswith(".")} == set(), "nothing is left beside it"


def test_prune_that_fails_at_the_end_leaves_no_half_model(checkpoint, monkeypatch):
    monkeypatch.setattr(RunReport, "save", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prune(checkpoint, "out", "--score", "uniform", "--no-plots")
    assert [path.name for path in (checkpoint / "out").iterdir()] == ["journal"]
    monkeypatch.undo()
    assert prune(checkpoint, "out", "--score", "uniform", "--no-plots") == 0
    assert "journal" not in {path.name for path in (checkpoint / "out").iterdir()}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--sparsity", "0.7", "--spread", "0.5"], "spread: expected 0..0.3"),
        (["--pattern", "N:5"], "pattern: expected rows of a multiple of 5"),
        (["--pattern", "N:1"], "group: expected at least 2"),
        (["--pattern", "N:8", "--sparsity", "0.9"], "budget: expected sparsity in 0..0.875"),
        (["--scores", "other.json"], "scores: expected those of a model with"),
        (["--scores", "none.json"], "scores: expected a file"),
    ],
)
def test_prune_fails_before_anything_is_measured(checkpoint, capsys, monkeypatch, arguments, message):
    def never(*args, **kwargs):
        raise AssertionError("measured already")

    monkeypatch.setattr("transformers.LlamaForCausalLM.forward", never)
    monkeypatch.chdir(checkpoint)
    LayerScores("m", "mine", [1.0, 2.0, 3.0, 4.0], [7] * 4).save("other.json")
    assert prune(checkpoint, "out", *arguments) == 2
    assert message in capsys.readouterr().err and not (checkpoint / "out").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--method", "best"], "method: expected one of magnitude, wanda, sparsegpt"),
        (["--score", "best"], "score: expected one of owl"),
        (["--sparsity", "1.2"], "sparsity: expected a share in 0..1, got 1.2"),
        (["--sparsity", "0.9", "--spread", "0.2"], "spread: expected 0..0.1"),
        (["--pattern", "2:5"], "pattern: expected rows of a multiple of 5"),
        (["--pattern", "2of4"], "pattern: expected N:M"),
        (["--pattern", "2:4", "--sparsity", "0.7"], "pattern: expected 2:4 without sparsity"),
        (["--sequence-length", "300"], "text: expected at least two samples of 300 tokens"),
        (["--sequence-length", "3000"], "at least one sample of 3000 tokens"),
        (["--eval-samples", "0"], "eval_samples: expected at least 1"),
        (["--scores", "none.json"], "scores: expected a file"),
    ],
)
def test_prune_with_bad_input(checkpoint, capsys, arguments, message):
    assert prune(checkpoint, "out", *arguments) == 2
    shown = capsys.readouterr().err
    assert message in shown and "Traceback" not in shown
    assert main(["prune", str(checkpoint / "model"), "--output", str(checkpoint / "model")]) == 2
    assert "output: expected another directory than the model's" in capsys.readouterr().err


def factorize(folder, output, *more):
    arguments = ["factorize", str(folder / "model"), "--text", str(folder / "text.txt")]
    return main([*arguments, "--output", str(folder / output), *QUICK, *more])


@pytest.mark.parametrize("score", ["spectrum", "angular"])
def test_factorize_writes_a_model_that_loads_and_a_report_of_it(checkpoint, capsys, score):
    source = {path.name: path.read_bytes() for path in (checkpoint / "model").iterdir()}
    assert factorize(checkpoint, "out", "--score", score, "--parameters", "0.6", "--eval-samples", "5") == 0
    names = {path.name for path in (checkpoint / "out").iterdir()}
    plan = "rank_plan.json" if score == "spectrum" else "allocation.json"
    assert {"model.safetensors", "modeling_shaped.py", plan, "report.md", "kept.png", "error.png"} <= names
    assert "journal" not in names and {p.name: p.read_bytes() for p in (checkpoint / "model").iterdir()} == source
    report, shown = RunReport.load(checkpoint / "out"), capsys.readouterr().out
    model, tokenizer = load_model(str(checkpoint / "out"))
    assert sum(p.numel() for p in model.parameters()) == report.results["parameters"]["factorized"]
    assert 0.5 < report.results["kept"] <= 0.6 and report.results["disk_bytes"] == (
        (checkpoint / "out" / "model.safetensors").stat().st_size
    )
    found = report.results["perplexity"]
    assert f"from {format_number(found['intact'])} to {format_number(found['factorized'])} (all layers alike" in shown
    speed = report.results["speed"]
    assert [*speed] == ["intact", "factorized"] and all(value > 0 for told in speed.values() for value in told.values())
    faster = [f"{speed['factorized'][part] / speed['intact'][part]:.2f} times" for part in ("prompt", "generation")]
    words = " ".join(shown.split())
    assert f"Tokens a second: {format_number(speed['factorized']['prompt'])} of a prompt of 8 (intact" in words
    assert all(part in words for part in faster) and "Tokens a second" in (checkpoint / "out" / "report.md").read_text()
    drawn = token_batches(tokenizer, TEXT, SampleSettings(sequence_length=8, max_samples=9, batch_size=1))
    assert perplexity(model, drawn[4:]) == pytest.approx(found["factorized"], rel=1e-5), "the later samples"
    assert factorize(checkpoint, "out") == 2
    assert "output: expected a new directory" in capsys.readouterr().err


def test_factorize_by_rank_and_earlier_scores(checkpoint):
    size = find_decoder_layers(load_model(str(checkpoint / "model"))[0]).count_weights(0)
    LayerScores("m", "mine", [1.0, 2.0, 3.0, 4.0], [size] * 4).save(checkpoint / "scores.json")
    given = ["--scores", str(checkpoint / "scores.json"), "--no-baseline", "--no-plots", "--no-speed"]
    assert factorize(checkpoint, "out", *given, "--rank", "0.3", "--method", "plain") == 0
    report = RunReport.load(checkpoint / "out")
    assert report.layers["score"] == [1.0, 2.0, 3.0, 4.0] and report.layers["rank"] == sorted(report.layers["rank"])
    assert "uniform" not in report.results["perplexity"] and report.settings["score"] == "mine"
    assert report.results["speed"] == {} and not any("second" in line for line in report.summary)
    assert factorize(checkpoint, "spread", *given, "--parameters", "0.6", "--spread", "0.15") == 0
    report = RunReport.load(checkpoint / "spread")
    assert report.layers["kept"] == sorted(report.layers["kept"]) and len(set(report.layers["kept"])) > 2


def test_factorize_follows_spectra_where_there_is_no_loss(checkpoint):
    """By entries, and of a model without a head, whatever the default is else."""
    quick = ["--no-baseline", "--no-plots"]
    assert factorize(checkpoint, "plain", "--method", "plain", *quick) == 0
    assert RunReport.load(checkpoint / "plain").settings["score"] == "spectrum"
    assert factorize(checkpoint, "whitened", *quick) == 0
    assert RunReport.load(checkpoint / "whitened").settings["score"] == "fisher"
    build("bert_headless").save_pretrained(checkpoint / "model")
    assert factorize(checkpoint, "headless", *quick) == 0
    report = RunReport.load(checkpoint / "headless")
    assert report.settings["score"] == "spectrum" and report.results["perplexity"] == {
        "intact": None,
        "factorized": None,
    }
    assert all(told["generation"] is None and told["prompt"] > 0 for told in report.results["speed"].values())
    assert [line.count("times") for line in report.summary if "Tokens a second" in line] == [1]


def test_factorize_by_oats_writes_a_model_that_packs(checkpoint, capsys):
    more = ["--method", "oats", "--parameters", "0.6", "--no-plots"]
    assert factorize(checkpoint, "out", *more) == 0
    report = RunReport.load(checkpoint / "out")
    assert report.settings["score"] == "uniform" and 0.55 < report.results["kept"] <= 0.6
    assert "stand in sparse parts" in capsys.readouterr().out and "uniform" not in report.results["perplexity"]
    assert main(["pack", str(checkpoint / "out"), str(checkpoint / "packed"), "--minimum", "0.3"]) == 0
    model, _ = load_model(str(checkpoint / "packed"))
    assert type(model.model.layers[2].mlp.up_proj.sparse).__name__ == "SparseLinear"


@pytest.mark.parametrize("command", ["factorize", "narrow"])
@pytest.mark.parametrize(
    "file, message",
    [("other.json", "scores: expected those of a model with"), ("none.json", "scores: expected a file")],
)
def test_scores_are_checked_before_anything_is_measured(checkpoint, capsys, monkeypatch, command, file, message):
    monkeypatch.setattr("transformers.LlamaForCausalLM.forward", lambda *a, **k: pytest.fail("measured already"))
    monkeypatch.chdir(checkpoint)
    LayerScores("m", "mine", [1.0, 2.0, 3.0, 4.0], [7] * 4).save("other.json")
    arguments = [command, "model", "--text", "text.txt", "--output", "out", "--scores", file, *QUICK]
    assert main(arguments) == 2
    assert message in capsys.readouterr().err and not (checkpoint / "out").exists()


@pytest.mark.process
def test_a_killed_factorization_goes_on_where_it_stopped(checkpoint):
    code = (
        "import sys, os\n"
        "from hf_cod.layers.sequential import FinishedLayers\n"
        "add, count = FinishedLayers.add, [0]\n"
        "def dies(self, index, note):\n"
        "    add(self, index, note)\n"
        "    count[0] += 1\n"
        "    if count[0] == 6: os._exit(9)\n"
        "FinishedLayers.add = dies\n"
        "from hf_cod.cli.main import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    arguments = ["factorize", str(checkpoint / "model"), "--text", str(checkpoint / "text.txt"), *QUICK, "--no-plots"]
    arguments.append("--no-baseline")
    killed = run_fresh(code, *arguments, "--output", checkpoint / "run")
    assert killed.returncode == 9
    kept = {path.name: path.stat().st_mtime_ns for path in (checkpoint / "run" / "journal").glob("*.safetensors")}
    assert len(kept) == 6, "four layers' spectra, two factorized"
    assert factorize(checkpoint, "run", "--no-plots", "--no-baseline") == 0
    assert factorize(checkpoint, "whole", "--no-plots", "--no-baseline") == 0
    weights = [(checkpoint / name / "model.safetensors").read_bytes() for name in ("run", "whole")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--parameters", "0.001"], "parameters: expected a share in 0."),
        (["--parameters", "1.5"], "parameters: expected a share above 0 and at most 1, got 1.5"),
        (["--rank", "0.5"], "rank: expected a score of layers beside it, got none"),
        (["--rank", "0.5", "--score", "spectrum"], "rank: expected a score of layers beside it, got spectrum"),
        (["--rank", "0.5", "--score", "owl", "--parameters", "0.5"], "rank: expected no parameters beside it"),
        (["--score", "fisher", "--method", "plain"], "score: expected spectrum or a score of layers for plain, got"),
        (["--method", "oats", "--rank", "0.5"], "method: expected parameters and a score of layers for oats, got rank"),
        (["--method", "oats", "--score", "fisher"], "and a score of layers for oats, got fisher"),
        (["--method", "oats", "--rank-share", "1"], "rank_share: expected a share between 0 and 1, got 1.0"),
        (["--rank", "2", "--score", "owl"], "rank: expected a share above 0 and at most 1, got 2.0"),
        (["--score", "auto"], "score: expected one of fisher, spectrum, owl"),
        (["--method", "best"], "method: expected one of whitened, plain, oats"),
        (["--spread", "0.1"], "spread: expected a score of layers beside it, got none"),
        (["--rank-share", "0.4"], "rank_share: expected method oats beside it, got whitened"),
        (["--score", "owl", "--rank", "0.9"], "plan: expected ranks at which factors have fewer weights"),
    ],
)
def test_factorize_with_bad_input(checkpoint, capsys, arguments, message):
    assert factorize(checkpoint, "out", *arguments) == 2
    shown = capsys.readouterr().err
    assert message in shown and "Traceback" not in shown


def narrow(folder, output, *more):
    arguments = ["narrow", str(folder / "model"), "--text", str(folder / "text.txt"), "--multiple", "8"]
    return main([*arguments, *QUICK, "--output", str(folder / output), *more])


@pytest.mark.parametrize("score", ["angular", "uniform"])
def test_narrow_writes_a_model_that_loads_and_a_report_of_it(checkpoint, capsys, score):
    source = {path.name: path.read_bytes() for path in (checkpoint / "model").iterdir()}
    more = ["--score", score, "--parameters", "0.6", "--eval-samples", "5"]
    more += ["--spread", "0.2"] if score == "angular" else []
    assert narrow(checkpoint, "out", *more) == 0
    names = {path.name for path in (checkpoint / "out").iterdir()}
    pictures = {"kept.png", "share_of_heads.png", "share_of_channels.png", "error.png", "score.png"}
    assert {"model.safetensors", "scores.json", "allocation.json", "report.md", *pictures} <= names
    assert ("modeling_shaped.py" in names) == (score == "angular")
    assert "journal" not in names and {p.name: p.read_bytes() for p in (checkpoint / "model").iterdir()} == source
    page = (checkpoint / "out" / "report.md").read_text()
    assert "| layer | kept | share of heads | share of channels |" in page
    report, shown = RunReport.load(checkpoint / "out"), capsys.readouterr().out
    assert report.results["stock"] == (score == "uniform")
    assert ("transformers loads it without this package" in shown) == (score == "uniform")
    model, tokenizer = load_model(str(checkpoint / "out"))
    assert sum(p.numel() for p in model.parameters()) == report.results["parameters"]["narrowed"]
    found = report.results["perplexity"]
    assert ("uniform" in found) == (score == "angular")
    assert f"from {format_number(found['intact'])} to {format_number(found['narrowed'])}" in shown
    assert [*report.results["speed"]] == ["intact", "narrowed"] and "Tokens a second: " in shown
    drawn = token_batches(tokenizer, TEXT, SampleSettings(sequence_length=8, max_samples=9, batch_size=1))
    assert perplexity(model, drawn[4:]) == pytest.approx(found["narrowed"], rel=1e-5), "the later samples"
    assert narrow(checkpoint, "out") == 2
    assert "output: expected a new directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--parameters", "0.05"], "parameters: expected at least 0."),
        (["--parameters", "1.5"], "parameters: expected a share above 0 and at most 1, got 1.5"),
        (["--method", "luck"], "method: expected one of fluctuation, taylor, magnitude, got 'luck'"),
        (["--compensation", "luck"], "compensation: expected one of least_squares, bias, none, got 'luck'"),
        (["--score", "spectrum"], "score: expected one of"),
        (["--multiple", "0"], "channel_multiple: expected a whole number above 0, got 0"),
    ],
)
def test_narrow_with_bad_input(checkpoint, capsys, arguments, message):
    assert narrow(checkpoint, "out", "--score", "uniform", *arguments) == 2
    shown = capsys.readouterr().err
    assert message in shown and "Traceback" not in shown


def test_pack_takes_its_output_by_place_or_by_option(checkpoint, capsys):
    assert prune(checkpoint, "sparse", "--sparsity", "0.7", "--score", "uniform", "--no-plots") == 0
    sparse, packed, other = (str(checkpoint / name) for name in ("sparse", "packed", "other"))
    assert main(["pack", sparse, packed]) == 0
    assert "matrices packed" in capsys.readouterr().out
    assert main(["pack", sparse, "--minimum", "0.6", "--output", other]) == 0
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        logits = [load_model(name)[0](ids).logits for name in (sparse, packed, other)]
    torch.testing.assert_close(logits[1], logits[0], atol=1e-5, rtol=1e-4)
    assert torch.equal(logits[1], logits[2])
    assert main(["pack", sparse, "--minimum", "0.6", packed]) == 2
    assert main(["pack", sparse, str(checkpoint / "a"), "--output", str(checkpoint / "b")]) == 2
    shown = capsys.readouterr().err
    assert "output: expected a new directory, an empty one" in shown and "output: expected one directory" in shown


def test_compare_puts_two_runs_in_one_picture(checkpoint, capsys):
    assert diagnose(checkpoint) == 0
    run, out = str(checkpoint / "run"), str(checkpoint / "both")
    assert main(["compare", run, run, "--labels", "left", "right", "--output", out]) == 0
    assert "effective depth" in capsys.readouterr().out
    assert (checkpoint / "both" / "compare.png").is_file()
    assert "left" in (checkpoint / "both" / "compare.md").read_text()


@pytest.mark.process
def test_a_killed_run_goes_on_where_it_stopped(checkpoint):
    """A process that dies in the middle of the sweep, and a second one with the same command."""
    code = (
        "import sys, os\n"
        "from hf_cod.io.files import Journal\n"
        "add, count = Journal.add, [0]\n"
        "def dies(self, key, value):\n"
        "    add(self, key, value)\n"
        "    count[0] += 1\n"
        "    if count[0] == 7: os._exit(9)\n"
        "Journal.add = dies\n"
        "from hf_cod.cli.main import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    arguments = ["diagnose", str(checkpoint / "model"), "--text", str(checkpoint / "text.txt"), *QUICK, "--no-plots"]
    killed = run_fresh(code, *arguments, "--output", checkpoint / "run")
    assert killed.returncode == 9
    kept = (checkpoint / "run" / "journal.jsonl").read_text().splitlines()
    assert len(kept) == 7
    assert diagnose(checkpoint, "--no-plots") == 0
    assert (checkpoint / "run" / "journal.jsonl").read_text().splitlines()[:7] == kept, "nothing was measured again"
    assert main([*arguments, "--output", str(checkpoint / "whole")]) == 0
    resumed, whole = (RunReport.load(checkpoint / name) for name in ("run", "whole"))
    assert resumed.layers == whole.layers and resumed.results == whole.results


def test_a_failing_metric_is_told_and_the_rest_is_kept(checkpoint, capsys):
    folder = checkpoint / "broken"
    folder.mkdir()
    (folder / "broken.py").write_text(
        "import evaluate\nimport datasets\n\n\nclass Broken(evaluate.Metric):\n"
        "    def _info(self):\n"
        "        number = datasets.Value('int64')\n"
        "        features = datasets.Features({'predictions': number, 'references': number})\n"
        "        return evaluate.MetricInfo(description='', citation='', inputs_description='', features=features)\n\n"
        "    def _compute(self, predictions, references):\n        raise ValueError('nothing to agree on')\n"
    )
    assert diagnose(checkpoint, "--drop-metric", str(folder), "--no-plots") == 1
    assert "nothing to agree on" in capsys.readouterr().err
    assert "gradient_norm" in RunReport.load(checkpoint / "run").layers


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["diagnose", "no/such-model"], "model: expected a Hub id"),
        (["diagnose", "./no-such-model"], "which does not exist"),
        (["compare", "a", "b"], "report: expected"),
        (
            ["fly"],
            "narrow, drop-layers, pack, quantize, fit, heal, finetune, compare, card, convert, env, got 'fly'",
        ),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, capsys):
    assert main(arguments) == 2
    shown = capsys.readouterr().err
    assert message in shown and "Traceback" not in shown


@pytest.mark.parametrize(
    "command, more",
    [("factorize", []), ("score", []), ("finetune", []), ("heal", ["--teacher"])],
)
def test_samples_longer_than_the_positions_of_a_model(tmp_path, capsys, command, more):
    build("gpt2").save_pretrained(tmp_path / "model")
    gpt_like().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    model, text, out = (str(tmp_path / name) for name in ("model", "text.txt", "out"))
    more = [*more, str(shutil.copytree(model, tmp_path / "teacher"))] if more else []
    assert main([command, model, *more, "--text", text, "--sequence-length", "65", "--output", out]) == 2
    assert "sequence_length: expected at most 64 tokens, for which transformer.wpe has positions, got 65" in (
        capsys.readouterr().err
    )


def test_a_model_is_no_text_and_a_file_no_output(checkpoint, capsys):
    model, text = str(checkpoint / "model"), str(checkpoint / "text.txt")
    assert main(["factorize", model, "--text", model, "--output", str(checkpoint / "out")]) == 2
    assert "text: expected a text file or a data set's name" in capsys.readouterr().err
    assert main(["factorize", model, "--text", text, "--output", text]) == 2
    assert "output: expected a directory, got the file" in capsys.readouterr().err


def test_text_shorter_than_a_window(checkpoint, capsys):
    (checkpoint / "text.txt").write_text("one two")
    capsys.readouterr()
    assert diagnose(checkpoint) == 2
    shown = capsys.readouterr().err
    assert "at least one sample of 8 tokens, got 2 tokens" in shown
    assert len(shown.splitlines()) == 1, "nothing but the error"


def test_an_unknown_option_shows_the_usage(capsys):
    with pytest.raises(SystemExit) as done:
        main(["diagnose", "x", "--max-sample-s", "3"])
    assert done.value.code == 2
    assert "unrecognized arguments: --max-sample-s" in capsys.readouterr().err


def test_options_have_one_spelling(capsys):
    with pytest.raises(SystemExit):
        main(["diagnose", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "--text-column" in shown and "--no-pack without this option: join the texts" in shown
    assert "_column" not in shown and "--no_" not in shown and "default: None" not in shown
    assert "(default: 256)" in shown and "(default: 0)" in shown
    assert "[--trust-remote-code]" in shown and "TRUST_REMOTE_CODE" not in shown and "--pack " not in shown


def test_arguments_may_stand_behind_options(checkpoint):
    """A boolean takes no value, so not the model's name either; and what is on stays on."""
    out, text = str(checkpoint / "out"), str(checkpoint / "text.txt")
    arguments = ["score", "--text", text, *QUICK, "--no-plots", "--per-module", str(checkpoint / "model")]
    assert main([*arguments, "--output", out]) == 0
    settings = RunReport.load(out).settings
    assert settings["per_module"] is True and settings["pack"] is True
    assert not (checkpoint / "out" / "score.png").exists()


def test_a_directory_is_called_by_its_name(checkpoint, monkeypatch):
    monkeypatch.chdir(checkpoint / "model")
    assert main(["diagnose", ".", "--text", str(checkpoint / "text.txt"), *QUICK, "--no-plots"]) == 0
    assert RunReport.load("hf-cod-diagnose-model").model == "model"


def test_help(capsys):
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in COMMANDS)
    for name in COMMANDS:
        with pytest.raises(SystemExit) as done:
            main([name, "--help"])
        assert done.value.code == 0
    assert "--sequence-length" in capsys.readouterr().out


def test_convert_to_lns_and_back_gives_equal_logits(checkpoint, capsys):
    stock, lns, back = (str(checkpoint / name) for name in ("model", "lns", "back"))
    assert main(["convert", "lns", stock, lns]) == 0
    assert main(["convert", "stock", lns, back]) == 0
    assert "CodLlamaForCausalLM" in capsys.readouterr().out
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        first, middle, last = (load_model(name)[0](ids).logits for name in (stock, lns, back))
    torch.testing.assert_close(middle, first, atol=1e-5, rtol=0)
    torch.testing.assert_close(last, first, atol=1e-5, rtol=0)
    assert load_model(back)[1] is not None, "the tokenizer comes along"
    assert main(["convert", "stock", lns, back]) == 2
    assert main(["convert", "authors", stock, str(checkpoint / "x")]) == 2
    shown = capsys.readouterr().err
    assert "output: expected a new directory, an empty one" in shown and "give --norm-type" in shown
