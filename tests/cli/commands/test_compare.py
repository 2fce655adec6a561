"""hf-cod compare: several runs in one picture."""

import torch

from hf_cod import RunReport
from hf_cod.cli.main import main
from tests.cli.runs import QUICK, diagnose
from tests.tiny_models import build
from tests.tiny_tokenizers import gpt_like


def test_compare_puts_two_runs_in_one_picture(checkpoint, capsys):
    assert diagnose(checkpoint) == 0
    run, out = str(checkpoint / "run"), str(checkpoint / "both")
    assert main(["compare", run, run, "--labels", "left", "right", "--output", out]) == 0
    assert "effective depth" in capsys.readouterr().out
    assert (checkpoint / "both" / "compare.png").is_file()
    assert "left" in (checkpoint / "both" / "compare.md").read_text()


def test_layers_of_one_model_in_another(checkpoint, capsys, monkeypatch):
    monkeypatch.chdir(checkpoint)
    other = build("llama")
    with torch.no_grad():
        other.model.layers[2].mlp.down_proj.weight.mul_(3)
    other.save_pretrained("other")
    gpt_like().save_pretrained("other")
    command = ["compare", "--swap", "model", "other", "--text", "text.txt", *QUICK, "--output", "swapped"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "swap: 12 models take about as long as" in shown and "One layer of the donor changes it by" in shown
    assert all((checkpoint / "swapped" / name).is_file() for name in ("swap.png", "report.md", "report.html"))
    report = RunReport.load("swapped")
    assert report.settings["donor"] == "other" and report.settings["sequence_length"] == 8
    assert [value != 0 for value in report.layers["swap_single"]] == [False, False, True, False]
    assert main(command) == 0, "into the same directory"


def test_what_swap_refuses(checkpoint, capsys, monkeypatch):
    monkeypatch.chdir(checkpoint)
    build("llama", 3).save_pretrained("shorter")
    gpt_like().save_pretrained("shorter")
    assert diagnose(checkpoint) == 0
    capsys.readouterr()
    for words, message in {
        "run run --swap model other": "swap: expected two models alone, got runs beside them",
        "--swap model none.gguf": "swap: expected a GGUF file, got 'none.gguf', which does not exist",
        "--labels a": "runs: expected at least two, got 0",
        "--swap model shorter --text text.txt": "swap: expected models with equally many layers, got 4 and 3",
        "run run --text text.txt": "text: expected none with runs, which are measured; --swap takes models",
    }.items():
        assert main(["compare", *words.split(), "--output", "refused"]) == 2
        assert message in capsys.readouterr().err
