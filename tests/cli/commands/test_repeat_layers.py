import pytest
import torch

from hf_cod import RepeatPlan, perplexity, repeated
from hf_cod.cli.main import main
from hf_cod.io.models import load_model
from hf_cod.io.report import RunReport, format_number
from hf_cod.io.text import SampleSettings, token_batches
from tests.fresh_processes import run_fresh
from tests.tiny_models import build
from tests.tiny_tokenizers import gpt_like

TEXT = "one two three four five six seven eight nine ten " * 60
QUICK = ["--sequence-length", "8", "--max-samples", "20", "--batch-size", "5", "--eval-samples", "5"]
STEPS = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two models: a random one, and one that was trained with its layer 2 running twice, which lacks the second run."""
    folder = tmp_path_factory.mktemp("repeat")
    (folder / "text.txt").write_text(TEXT)
    tokenizer, model = gpt_like(), build("llama")
    for name in ("random", "lacking"):
        tokenizer.save_pretrained(folder / name)
    model.save_pretrained(folder / "random")
    batch = token_batches(tokenizer, TEXT, SampleSettings(sequence_length=8, max_samples=64, batch_size=64))[0]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with repeated(model, 2, 3):
        for _ in range(STEPS):
            optimizer.zero_grad()
            model(**batch, labels=batch["input_ids"]).loss.backward()
            optimizer.step()
    model.save_pretrained(folder / "lacking")
    return folder


def repeat_layers(folder, model, output, *more):
    text = ["--text", str(folder / "text.txt"), "--output", str(output)]
    return main(["repeat-layers", str(folder / model), *text, *QUICK, *more])


def test_a_given_block_is_written_as_a_stock_model(folder, tmp_path, capsys):
    assert repeat_layers(folder, "random", tmp_path / "out", "--start", "1", "--end", "3", "--times", "3") == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"model.safetensors", "repeat_plan.json", "report.md", "runs.png"} <= names
    assert "journal" not in names and not any(name.endswith(".py") for name in names)
    report, shown = RunReport.load(tmp_path / "out"), capsys.readouterr().out
    model, tokenizer = load_model(str(tmp_path / "out"))
    assert model.config.num_hidden_layers == 8 and type(model).__module__.startswith("transformers.")
    assert report.layers["runs"] == [1, 3, 3, 1] and report.results["order"] == [0, 1, 2, 1, 2, 1, 2, 3]
    assert sum(p.numel() for p in model.parameters()) == report.results["parameters"]["repeated"]
    assert [*report.results["speed"]] == ["intact", "repeated"] and "8 layers instead of 4" in shown
    found = report.results["perplexity"]
    assert f"from {format_number(found['intact'])} to {format_number(found['repeated'])}, on " in shown
    drawn = token_batches(tokenizer, TEXT, SampleSettings(sequence_length=8, max_samples=25, batch_size=1))
    assert perplexity(model, drawn[20:]) == pytest.approx(found["repeated"], rel=1e-5)
    plan = ["--plan", str(tmp_path / "out" / "repeat_plan.json"), "--no-plots", "--no-speed"]
    assert repeat_layers(folder, "random", tmp_path / "again", *plan) == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again")]
    assert weights[0] == weights[1]


def test_a_search_finds_what_a_model_lacks(folder, tmp_path, capsys):
    more = ["--search", "--length", "1", "2", "--explain", "--no-plots", "--no-speed"]
    assert repeat_layers(folder, "lacking", tmp_path / "out", *more) == 0
    shown, plan = capsys.readouterr().out, RepeatPlan.load(tmp_path / "out" / "repeat_plan.json")
    assert (plan.start, plan.end) == (2, 3) and plan.gains and len(plan.candidates) == 7
    assert "search: 7 blocks on 10 samples take as long as 8 forward passes" in shown
    assert "This block lowers the loss." in shown and "last layer" in shown
    found = RunReport.load(tmp_path / "out").results["perplexity"]
    assert found["repeated"] < found["intact"]


def test_without_a_gain_nothing_is_written_but_by_force(folder, tmp_path, capsys):
    """After its own second run of layer 2, a third one is too much."""
    assert repeat_layers(folder, "lacking", tmp_path / "deeper", "--start", "2", "--end", "3", "--no-speed") == 0
    capsys.readouterr()
    more = ["--search", "--length", "1", "--no-plots", "--no-speed"]
    text = ["--text", str(folder / "text.txt"), "--output", str(tmp_path / "out"), *QUICK, *more]
    assert main(["repeat-layers", str(tmp_path / "deeper"), *text]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "No block was found that lowers the loss." in shown and "95 % interval" in shown
    assert "--force writes the model with this block all the same. no model was written" in shown
    assert {path.name for path in (tmp_path / "out").iterdir()} <= {"journal"}
    forced = [*text[:2], "--output", str(tmp_path / "forced"), *text[4:], "--force"]
    assert main(["repeat-layers", str(tmp_path / "deeper"), *forced]) == 0
    report = RunReport.load(tmp_path / "forced")
    assert "No block was found that lowers the loss." in report.summary
    assert load_model(str(tmp_path / "forced"))[0].config.num_hidden_layers == 6


@pytest.mark.process
def test_a_killed_search_resumes(folder, tmp_path):
    code = (
        "import sys, os\n"
        "from hf_cod.io.journal import Journal\n"
        "add, count = Journal.add, [0]\n"
        "def dies(self, key, value):\n"
        "    add(self, key, value)\n"
        "    count[0] += 1\n"
        "    if count[0] == 9: os._exit(9)\n"
        "Journal.add = dies\n"
        "from hf_cod.cli.main import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    more = ["--search", "--length", "1", "--no-plots", "--no-speed"]
    text = ["--text", str(folder / "text.txt"), "--output", str(tmp_path / "run")]
    killed = run_fresh(code, "repeat-layers", str(folder / "lacking"), *text, *QUICK, *more)
    assert killed.returncode == 9
    assert len((tmp_path / "run" / "journal" / "journal.jsonl").read_text().splitlines()) == 9
    assert repeat_layers(folder, "lacking", tmp_path / "run", *more) == 0
    assert repeat_layers(folder, "lacking", tmp_path / "whole", *more) == 0
    plans = [(tmp_path / name / "repeat_plan.json").read_bytes() for name in ("run", "whole")]
    assert plans[0] == plans[1]


@pytest.mark.parametrize(
    "more, message",
    [
        ([], "start: expected a block by start and end, or search, got neither"),
        (["--start", "1"], "end: expected an index beside start, got none"),
        (["--start", "2", "--end", "2"], "end: expected more than start (2), got 2"),
        (["--start", "1", "--end", "5"], "end: expected more than start (1), up to 4, got 5"),
        (["--start", "1", "--end", "2", "--search"], "search: expected either search, or start and end, got both"),
        (["--start", "1", "--end", "2", "--length", "3"], "length: expected none with a given block"),
        (["--search", "--length", "5"], "length: expected 1..4, the number of layers, got 5"),
        (["--plan", "none.json"], "plan: expected a file, got"),
        (["--plan", __file__, "--search"], "plan: expected no search, which is part of the plan"),
    ],
)
def test_bad_input(folder, tmp_path, capsys, more, message):
    assert repeat_layers(folder, "random", tmp_path / "out", *more) == 2
    shown = capsys.readouterr().err
    assert message in shown and "Traceback" not in shown
