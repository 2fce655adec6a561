"""hf-cod compare: several runs in one picture."""

from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from hf_cod import RunReport, allocate, collect_statistics, import_scores, score_layers
from hf_cod.cli.main import main
from hf_cod.io.files import write_json
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


def test_scores_and_plans_of_other_tools(checkpoint, capsys, monkeypatch):
    monkeypatch.chdir(checkpoint)
    model = AutoModelForCausalLM.from_pretrained("model")
    names = [
        name for name, module in model.model.layers.named_modules(prefix="model.layers") if type(module) is nn.Linear
    ]
    write_json("mlx.json", [[name, float(place)] for place, name in enumerate(names)])
    write_json("auto.json", {name: {"bits": 4} for name in names if ".3." in name})
    Path("t.csv").write_text("".join(f"model.layers.{index},{-index}\n" for index in range(4)))
    score_layers(model, method="depth").save("scores.json")
    allocate(import_scores(model, "mlx.json"), "bits", 3.5).save("allocation.json")
    collect_statistics(model, [{"input_ids": torch.arange(8)[None]}]).save("i.gguf", model=model)
    files = ["scores.json", "mlx.json", "auto.json", "t.csv", "allocation.json", "i.gguf"]
    assert main(["compare", "--model", "model", *files, "--rest", "3", "--output", "both"]) == 0
    page = Path("both/compare.md").read_text()
    (row,) = (line for line in page.splitlines() if line.startswith("| rank correlation of layers with mlx.json"))
    # depth and the table fall with the index; auto.json has ties: four bits in the last layer, three in the others.
    assert [cell.strip() for cell in row.split("|")[2:6]] == ["-1", "-", "0.775", "-1"]
    assert "plan of bits by module (auto-round)" in page and "plan of bits by module (mlx)" in page
    assert main(["compare", "--model", "model", *files, "--rest", "3", "--output", "both"]) == 0, "into the same one"
    write_json("other.json", [["model.layers.7", 1.0]])
    build("llama", 3).save_pretrained("shorter")
    score_layers(build("llama", 3), method="depth").save("shorter.json")
    capsys.readouterr()
    for words, message in {
        "--model model scores.json": "runs: expected at least two files of scores or plans, got 1",
        "--model model scores.json shorter.json": "scores: expected those of a model with 4 layers, got 3",
        "--model model scores.json other.json": "expected modules of the model, got 1 of 1 that it does not have",
        "--model model scores.json none.csv": "got 'none.csv', which does not exist",
        "--model model scores.json auto.json": "plan: expected a number for each matrix of the layers",
        "--model model scores.json mlx.json --labels a": "labels: expected 2, one for each plan, got 1",
        "--rest 3 mlx.json mlx.json": "rest: expected none without --model, got 3",
        "--model model t.csv t.csv --swap model model": "swap: expected two models alone, got runs beside them",
    }.items():
        assert main(["compare", *words.split(), "--output", "refused"]) == 2
        assert message in capsys.readouterr().err
