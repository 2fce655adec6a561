"""hf-cod report: finished runs in the terminal, as a page and as a Space."""

import pytest
from huggingface_hub import HfApi

from hf_cod.cli.main import main
from hf_cod.io.report import RunReport
from tests.cli.runs import diagnose
from tests.reporting.html.runs import diagnosed


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, layers in (("one", 4), ("two", 6)):
        diagnosed(layers, name).save(name)
    return tmp_path


def test_the_page_of_a_run_is_beside_its_report(runs, capsys):
    assert main(["report", "one"]) == 0
    assert "Effective depth 1.4." in capsys.readouterr().out and not (runs / "one" / "report.html").exists()
    for _ in range(2):  # an earlier page is replaced
        assert main(["report", "one/report.json", "--html"]) == 0
    assert (runs / "one" / "report.html").read_text(encoding="utf-8") == RunReport.load("one").to_html()


def test_several_runs_are_on_one_page(runs, capsys):
    assert main(["report", "one", "two", "--html", "--labels", "left", "right"]) == 0
    page = (runs / "hf-cod-report.html").read_text(encoding="utf-8")
    assert "<title>diagnose: left / right</title>" in page and "Effective depth in layers: 1.4 (left)" in page
    assert main(["report", "one", "two", "--html", "--labels", "left"]) == 2
    assert "labels: expected 2, one for each run, got 1" in capsys.readouterr().err


def test_reports_of_other_commands_have_pages(runs):
    diagnosed(3, kind="score", layers={"score": [1.0, 2.0, 3.0], "parameters": [9, 9, 9]}, results={}).save("scored")
    assert main(["report", "scored", "one", "--html", "--output", "both.html"]) == 0
    assert (runs / "both.html").is_file()


def test_diagnose_and_compare_write_pages(checkpoint):
    for _ in range(2):
        assert diagnose(checkpoint, "--no-plots") == 0
    run = checkpoint / "run"
    assert (run / "report.html").read_text(encoding="utf-8") == RunReport.load(run).to_html()
    sizes = RunReport.load(run).results["layer_parameters"]
    assert len(sizes) == RunReport.load(run).n_layers and min(sizes) > 0
    for _ in range(2):
        assert main(["compare", str(run), str(run), "--no-plots", "--output", str(checkpoint / "both")]) == 0
    assert (checkpoint / "both" / "compare.html").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("one --html --output mine.html", "output: expected a new file, or an earlier page, got 'mine.html'"),
        ("one --html --output two", "output: expected a file, got the directory 'two'"),
        ("one --output page.html", "output: expected --html or --space with --output, got 'page.html' alone"),
        ("one --upload", "upload: expected --space USER/NAME with --upload, got none"),
        ("one --html --space me/layers", "space: expected either --html or --space, got both, with 'me/layers'"),
        ("one --space layers", "space: expected USER/NAME of a Space on the Hub, got 'layers'"),
        ("one --space me/layers --output full", "output: expected a directory without README.md"),
    ],
)
def test_wrong_calls(words, message, runs, capsys):
    (runs / "mine.html").write_text("mine")
    (runs / "full").mkdir()
    (runs / "full" / "README.md").write_text("mine")
    assert main(["report", *words.split()]) == 2
    assert f"hf-cod report: error: {message}" in capsys.readouterr().err
    assert (runs / "mine.html").read_text() == (runs / "full" / "README.md").read_text() == "mine"


def test_a_space_is_written_without_network_and_uploaded_on_request(runs, capsys, monkeypatch):
    calls = []
    address = "https://huggingface.co/spaces/me/layers"
    monkeypatch.setattr(HfApi, "create_repo", lambda _, name, **more: calls.append((name, more)) or address)
    monkeypatch.setattr(HfApi, "upload_folder", lambda _, **more: calls.append(more))
    assert main(["report", "one", "--space", "me/layers"]) == 0
    assert not calls and {path.name for path in (runs / "hf-cod-space-layers").iterdir()} == {"README.md", "index.html"}
    assert main(["report", "one", "--space", "me/layers", "--upload"]) == 0
    (name, created), uploaded = calls
    assert name == "me/layers" and (created["repo_type"], created["space_sdk"]) == ("space", "static")
    assert uploaded["repo_type"] == "space" and {*uploaded["allow_patterns"]} == {"README.md", "index.html"}
    assert f"uploaded to {address}" in capsys.readouterr().out


def test_a_failed_upload_keeps_the_directory(runs, capsys, monkeypatch):
    def fails(*_, **__):
        raise OSError("no token")

    monkeypatch.setattr(HfApi, "create_repo", fails)
    assert main(["report", "one", "--space", "me/layers", "--upload"]) == 1
    told = "got: no token; the directory is complete: hf upload me/layers hf-cod-space-layers --repo-type space"
    assert told in capsys.readouterr().err and (runs / "hf-cod-space-layers" / "index.html").is_file()
