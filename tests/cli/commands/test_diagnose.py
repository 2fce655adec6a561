"""hf-cod diagnose: what is written, resumed and reported of a tiny model."""

import errno
import os
from dataclasses import asdict

import pytest

from hf_cod.cli.main import main
from hf_cod.io.report import RunReport
from hf_cod.io.settings import ModelSettings, TextSettings
from tests.cli.runs import QUICK, diagnose
from tests.fresh_processes import run_fresh


def test_diagnose_writes_report_and_pictures(checkpoint, capsys):
    assert diagnose(checkpoint) == 0
    names = {path.name for path in (checkpoint / "run").iterdir()}
    assert {"report.json", "report.md", "overview.png", "angular_distance.png", "layer_drop.png"} <= names
    shown = capsys.readouterr().out
    assert "Effective depth" in shown and "gradient" in shown


def test_the_report_has_the_settings_of_its_inputs(checkpoint):
    """As the reports of all commands with a model and a text."""
    assert diagnose(checkpoint, "--no-plots", "--dtype", "float32") == 0
    told = RunReport.load(checkpoint / "run").settings
    expected = asdict(ModelSettings(dtype="float32")) | asdict(TextSettings(text=str(checkpoint / "text.txt")))
    assert {name: told[name] for name in expected} == expected
    assert diagnose(checkpoint, "--no-plots", "--dtype", "float32") == 0, "the same run"
    assert not (checkpoint / "run" / "earlier-1").exists()


def test_a_report_is_written_with_its_plots_or_not_at_all(checkpoint, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(RunReport, "plot", full)
        assert diagnose(checkpoint) == 1
    assert "kept for the same command to resume: journal.jsonl" in capsys.readouterr().err
    assert [path.name for path in (checkpoint / "run").iterdir()] == ["journal.jsonl"]
    assert diagnose(checkpoint) == 0


@pytest.mark.process
def test_a_killed_run_goes_on_where_it_stopped(checkpoint):
    """A process that dies in the middle of the sweep, and a second one with the same command."""
    code = (
        "import sys, os\n"
        "from hf_cod.io.journal import Journal\n"
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


def test_text_shorter_than_a_window(checkpoint, capsys):
    (checkpoint / "text.txt").write_text("one two")
    capsys.readouterr()
    assert diagnose(checkpoint) == 2
    shown = capsys.readouterr().err
    assert "at least one sample of 8 tokens, got 2 tokens" in shown
    assert len(shown.splitlines()) == 1, "nothing but the error"


def test_a_directory_is_called_by_its_name(checkpoint, monkeypatch):
    monkeypatch.chdir(checkpoint / "model")
    assert main(["diagnose", ".", "--text", str(checkpoint / "text.txt"), *QUICK, "--no-plots"]) == 0
    assert RunReport.load("hf-cod-diagnose-model").model == "model"


def test_answers_to_tasks(checkpoint, capsys):
    (checkpoint / "sums.jsonl").write_text('{"prompt": "one two", "answer": " three"}\n' * 9)
    options = ["--metrics", "generation", "--max-new-tokens", "2", "--no-plots"]
    assert diagnose(checkpoint, "--tasks", str(checkpoint / "sums.jsonl"), *options) == 0
    shown = capsys.readouterr().out
    assert "without a layer) answer at most" in shown and "Rank correlation of the harm" in shown
    found = RunReport.load(checkpoint / "run")
    assert found.results["generation"]["prompts"] == 9
    assert {"reference_loss", "chain_loss", "task_accuracy"} <= found.layers.keys() & found.results["intervals"].keys()
    assert diagnose(checkpoint, "--tasks", "gym:sums", *options) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_measures_on_request(checkpoint, capsys):
    metrics = ["layer_drop", "jacobian", "attention_sinks", "logit_lens"]
    assert diagnose(checkpoint, "--metrics", *metrics) == 0
    shown = capsys.readouterr().out
    assert "jacobian, attention sinks, logit lens: about as long as 7 passes of the samples" in shown
    assert "Rank correlation with the harm of a layer's removal" in shown
    assert all((checkpoint / "run" / f"{name}.png").is_file() for name in metrics)
    page = (checkpoint / "run" / "report.md").read_text(encoding="utf-8")
    assert "| layer | layer drop | jacobian | attention sinks | sink heads | logit lens | lens gain |" in page
    assert "- sink heads: share of heads" in page
