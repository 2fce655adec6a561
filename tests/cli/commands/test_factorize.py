"""hf-cod factorize on a tiny model: what is written, resumed and refused."""

import pytest

from hf_cod import find_decoder_layers, perplexity
from hf_cod.cli.main import main
from hf_cod.io.models import load_model
from hf_cod.io.report import RunReport, format_number
from hf_cod.io.text import SampleSettings, token_batches
from hf_cod.scoring.layer_scores import LayerScores
from tests.cli.runs import QUICK, TEXT, factorize
from tests.fresh_processes import run_fresh
from tests.tiny_models import build


@pytest.mark.parametrize("score", ["spectrum", "angular"])
def test_factorize_writes_a_model_that_loads_and_a_report_of_it(checkpoint, capsys, score):
    source = {path.name: path.read_bytes() for path in (checkpoint / "model").iterdir()}
    more = ["--score", score, "--parameter-share", "0.6", "--eval-samples", "5", "--force"]
    assert factorize(checkpoint, "out", *more) == 0
    names = {path.name for path in (checkpoint / "out").iterdir()}
    plan = "rank_plan.json" if score == "spectrum" else "allocation.json"
    assert {"model.safetensors", "modeling_shaped.py", plan, "report.md", "parameter_share.png", "error.png"} <= names
    assert "journal" not in names and {p.name: p.read_bytes() for p in (checkpoint / "model").iterdir()} == source
    report, shown = RunReport.load(checkpoint / "out"), capsys.readouterr().out
    model, tokenizer = load_model(str(checkpoint / "out"))
    assert sum(p.numel() for p in model.parameters()) == report.results["parameters"]["factorized"]
    assert 0.5 < report.results["parameter_share"] <= 0.6 and report.results["disk_bytes"] == (
        (checkpoint / "out" / "model.safetensors").stat().st_size
    )
    found = report.results["perplexity"]
    assert f"from {format_number(found['intact'])} to {format_number(found['factorized'])} (uniform plan" in shown
    speed = report.results["speed"]
    assert [*speed] == ["intact", "factorized"] and all(value > 0 for told in speed.values() for value in told.values())
    faster = [f"{speed['factorized'][part] / speed['intact'][part]:.2f} times" for part in ("prompt", "generation")]
    words = " ".join(shown.split())
    assert f"Tokens per second: {format_number(speed['factorized']['prompt'])} for a prompt of 8 (intact" in words
    assert (
        all(part in words for part in faster) and "Tokens per second" in (checkpoint / "out" / "report.md").read_text()
    )
    drawn = token_batches(tokenizer, TEXT, SampleSettings(sequence_length=8, max_samples=9, batch_size=1))
    assert perplexity(model, drawn[4:]) == pytest.approx(found["factorized"], rel=1e-5), "the later samples"
    assert factorize(checkpoint, "out") == 2
    assert "output: expected a new directory" in capsys.readouterr().err


def test_factorize_by_rank_and_earlier_scores(checkpoint):
    size = find_decoder_layers(load_model(str(checkpoint / "model"))[0]).count_weights(0)
    LayerScores("m", "mine", [1.0, 2.0, 3.0, 4.0], [size] * 4).save(checkpoint / "scores.json")
    given = ["--scores", str(checkpoint / "scores.json"), "--no-baseline", "--no-plots", "--no-speed"]
    assert factorize(checkpoint, "out", *given, "--full-rank-share", "0.3", "--method", "plain") == 0
    report = RunReport.load(checkpoint / "out")
    assert report.layers["score"] == [1.0, 2.0, 3.0, 4.0] and report.layers["full_rank_share"] == sorted(
        report.layers["full_rank_share"]
    )
    assert "uniform" not in report.results["perplexity"] and report.settings["score"] == "mine"
    assert report.results["speed"] == {} and not any("second" in line for line in report.summary)
    assert factorize(checkpoint, "spread", *given, "--parameter-share", "0.6", "--spread", "0.15") == 0
    report = RunReport.load(checkpoint / "spread")
    assert (
        report.layers["parameter_share"] == sorted(report.layers["parameter_share"])
        and len(set(report.layers["parameter_share"])) > 2
    )


def test_factorize_follows_spectra_where_there_is_no_loss(checkpoint):
    """By entries, and of a model without a head, whatever the default is else."""
    quick = ["--no-baseline", "--no-plots"]
    assert factorize(checkpoint, "plain", "--method", "plain", *quick) == 0
    assert RunReport.load(checkpoint / "plain").settings["score"] == "spectrum"
    assert "ranks are by spectrum, the default here: fisher requires" in RunReport.load(checkpoint / "plain").notes[-1]
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
    assert [line.count("times") for line in report.summary if "Tokens per second" in line] == [1]


def test_factorize_by_oats_writes_a_model_that_packs(checkpoint, capsys):
    more = ["--method", "oats", "--parameter-share", "0.6", "--no-plots"]
    assert factorize(checkpoint, "out", *more) == 0
    report = RunReport.load(checkpoint / "out")
    assert report.settings["score"] == "uniform" and 0.55 < report.results["parameter_share"] <= 0.6
    assert "are in sparse parts" in capsys.readouterr().out and "uniform" not in report.results["perplexity"]
    assert main(["pack", str(checkpoint / "out"), str(checkpoint / "packed"), "--min-sparsity", "0.3"]) == 0
    model, _ = load_model(str(checkpoint / "packed"))
    assert type(model.model.layers[2].mlp.up_proj.sparse).__name__ == "SparseLinear"


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
        (["--parameter-share", "0.001"], "parameter_share: expected a share in 0."),
        (["--parameter-share", "1.5"], "parameter_share: expected a share above 0 and at most 1, got 1.5"),
        (["--full-rank-share", "0.5"], "full_rank_share: expected a score of layers, got none"),
        (
            ["--full-rank-share", "0.5", "--score", "spectrum"],
            "full_rank_share: expected a score of layers, got spectrum",
        ),
        (
            ["--full-rank-share", "0.5", "--score", "owl", "--parameter-share", "0.5"],
            "full_rank_share: expected either full_rank_share or parameter_share",
        ),
        (["--score", "fisher", "--method", "plain"], "score: expected spectrum or a score of layers for plain, got"),
        (
            ["--method", "oats", "--full-rank-share", "0.5"],
            "method: expected parameter_share and a score of layers for oats, got full_rank_share",
        ),
        (["--method", "oats", "--score", "fisher"], "and a score of layers for oats, got fisher"),
        (["--method", "oats", "--factor-share", "1"], "factor_share: expected a share between 0 and 1, got 1.0"),
        (
            ["--full-rank-share", "2", "--score", "owl"],
            "full_rank_share: expected a share above 0 and at most 1, got 2.0",
        ),
        (["--score", "auto"], "score: expected one of fisher, spectrum, owl"),
        (["--method", "best"], "method: expected one of whitened, plain, oats"),
        (["--spread", "0.1"], "spread: expected a score of layers, got none"),
        (["--factor-share", "0.4"], "factor_share: expected method oats, got whitened"),
        (["--score", "owl", "--full-rank-share", "0.9"], "plan: expected ranks at which factors have fewer weights"),
    ],
)
def test_factorize_with_bad_input(checkpoint, capsys, arguments, message):
    assert factorize(checkpoint, "out", *arguments) == 2
    shown = capsys.readouterr().err
    assert message in shown and "Traceback" not in shown
