"""The tutorials' scripts run, on fewer samples and steps, and what they print is so."""

import importlib.util

import pytest

from tests.docs.pages import ROOT

TUTORIALS = ROOT / "examples" / "tutorials"


def run(name, *arguments):
    spec = importlib.util.spec_from_file_location(name, TUTORIALS / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script.main(arguments)


def test_see_your_layers(tmp_path, capsys):
    found = run("see_your_layers", "--samples", "8", "--length", "32", "--output", str(tmp_path))
    shown = capsys.readouterr().out
    assert "Effective depth" in shown and "| variance of the last layer |" in shown
    assert {"report.json", "overview.png", "compare.png"} <= {path.name for path in tmp_path.iterdir()}
    assert set(found) == {"intact", "without"}


def test_fine_tune(tmp_path):
    found = run("fine_tune", "--samples", "64", "--length", "64", "--steps", "8", "--output", str(tmp_path))
    assert found["after"] < found["before"]
    assert found["loaded"] == pytest.approx(found["after"], rel=1e-5)


def test_compress(tmp_path):
    small = ["--samples", "4", "--length", "32", "--steps", "2"]
    found = run("compress", *small, "--share", "0.8", "--output", str(tmp_path))
    assert list(found) == ["intact", "compressed", "healed", "loaded"]
    assert found["loaded"] == pytest.approx(found["healed"], rel=1e-5)


def test_pretrain(tmp_path):
    found = run(
        "pretrain_lns", "--samples", "80", "--length", "32", "--layers", "4", "--steps", "10", "--output", str(tmp_path)
    )
    assert found["lns"]["variance of the last layer"] < found["pre"]["variance of the last layer"]
    assert found["lns"]["difference after folding"] < 1e-4
    assert (tmp_path / "as-llama" / "config.json").is_file()
