import pytest
import torch

from hf_cod import DepthPlan, perplexity
from hf_cod.cli.main import main
from hf_cod.io.models import load_model
from hf_cod.io.report import RunReport, format_number
from hf_cod.io.text import SampleSettings, token_batches
from hf_cod.models import CodLlamaConfig, CodLlamaForCausalLM
from tests.fresh_processes import run_fresh
from tests.tiny_models import build
from tests.tiny_tokenizers import gpt_like

TEXT = "one two three four five six seven eight nine ten " * 40
QUICK = ["--sequence-length", "8", "--max-samples", "4", "--batch-size", "2", "--eval-samples", "5"]


@pytest.fixture
def checkpoint(tmp_path):
    build("llama").save_pretrained(tmp_path / "model")
    gpt_like().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def arguments(folder, output, *more):
    text = ["--text", str(folder / "text.txt"), "--output", str(folder / output)]
    return ["drop-layers", str(folder / "model"), *text, *QUICK, *more]


def drop_layers(folder, output, *more):
    return main(arguments(folder, output, *more))


def test_what_is_written_is_a_stock_model_and_its_report_is_true(checkpoint, capsys):
    source = {path.name: path.read_bytes() for path in (checkpoint / "model").iterdir()}
    assert drop_layers(checkpoint, "out", "--parameter-share", "0.5", "--explain", "--no-protect") == 0
    names = {path.name for path in (checkpoint / "out").iterdir()}
    assert {"model.safetensors", "depth_plan.json", "report.md", "removed.png"} <= names
    assert "journal" not in names and not any(name.endswith(".py") for name in names)
    assert {p.name: p.read_bytes() for p in (checkpoint / "model").iterdir()} == source
    report, shown = RunReport.load(checkpoint / "out"), capsys.readouterr().out
    model, tokenizer = load_model(str(checkpoint / "out"))
    assert model.config.num_hidden_layers == 2 and type(model).__module__.startswith("transformers.")
    plan = DepthPlan.load(checkpoint / "out" / "depth_plan.json")
    assert len(plan.layers) == 2 and report.results["removed"] == plan.layers and report.layers["cost"] == plan.costs
    assert sum(p.numel() for p in model.parameters()) == report.results["parameters"]["dropped"]
    found = report.results["perplexity"]
    assert f"from {format_number(found['intact'])} to {format_number(found['dropped'])}, on " in shown
    assert [*report.results["speed"]] == ["intact", "dropped"] and "Tokens per second: " in shown
    assert "2 of 4 layers" in shown and "greedy: without layers" in shown and "As before, it loads" not in shown
    drawn = token_batches(tokenizer, TEXT, SampleSettings(sequence_length=8, max_samples=9, batch_size=1))
    assert perplexity(model, drawn[4:]) == pytest.approx(found["dropped"], rel=1e-5), "the later samples"
    assert drop_layers(checkpoint, "out") == 2
    assert "output: expected a new directory" in capsys.readouterr().err


def test_an_earlier_plan_and_a_named_number(checkpoint):
    model, _ = load_model(str(checkpoint / "model"))
    sizes = [sum(p.numel() for p in layer.parameters() if p.dim() == 2) for layer in model.model.layers]
    DepthPlan("m", "given", [1], sizes).save(checkpoint / "plan.json")
    more = ["--plan", str(checkpoint / "plan.json"), "--replacement", "none"]
    assert drop_layers(checkpoint, "out", *more) == 0
    saved, _ = load_model(str(checkpoint / "out"))
    assert torch.equal(saved.model.layers[1].mlp.up_proj.weight, model.model.layers[2].mlp.up_proj.weight)
    assert (checkpoint / "out" / "removed.png").is_file()
    report = RunReport.load(checkpoint / "out")
    assert report.settings["criterion"] == "given"
    assert report.notes == [
        f"plan: used on {checkpoint / 'model'}, but computed for m, which has layers of the same sizes"
    ]
    assert (
        drop_layers(checkpoint, "two", "--n-removed", "3", "--criterion", "layer_drop", "--no-protect", "--no-plots")
        == 0
    )
    assert load_model(str(checkpoint / "two"))[0].config.num_hidden_layers == 1


def test_a_model_of_ours_says_how_it_loads(checkpoint, capsys):
    config = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    CodLlamaForCausalLM(CodLlamaConfig(**config, num_hidden_layers=3, norm_placement="lns")).save_pretrained(
        checkpoint / "model"
    )
    assert drop_layers(checkpoint, "out", "--n-removed", "1", "--criterion", "angular", "--no-plots", "--no-speed") == 0
    assert "As before, it loads if hf_cod is imported" in capsys.readouterr().out


@pytest.mark.process
def test_a_killed_search_goes_on_where_it_stopped(checkpoint):
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
    more = ["--n-removed", "2", "--no-plots", "--no-protect"]
    killed = run_fresh(code, *arguments(checkpoint, "run", *more))
    assert killed.returncode == 9
    assert len((checkpoint / "run" / "journal" / "journal.jsonl").read_text().splitlines()) == 9
    assert drop_layers(checkpoint, "run", *more) == 0
    assert drop_layers(checkpoint, "whole", *more) == 0
    weights = [(checkpoint / name / "model.safetensors").read_bytes() for name in ("run", "whole")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    "more, message",
    [
        (["--n-removed", "0"], "n_removed: expected at least 1 layer to remove, got 0"),
        (["--n-removed", "4"], "n_removed: expected 1..3 of 4 layers to remove, got 4"),
        (["--n-removed", "1", "--parameter-share", "0.5"], "n_removed: expected either n_removed or parameter_share"),
        (
            ["--parameter-share", "0.1"],
            "parameter_share: expected at least 0.25, which leaves one of 4 layers, got 0.1",
        ),
        (["--parameter-share", "1"], "parameter_share: expected a share between 0 and 1, got 1.0"),
        (["--criterion", "best"], "criterion: expected one of search, layer_drop"),
        (["--replacement", "best"], "replacement: expected one of none, linear, measured"),
        (["--plan", "none.json"], "plan: expected a file, got"),
        (["--plan", __file__, "--n-removed", "2"], "plan: expected no n_removed, which is part of the plan"),
        (["--plan", __file__, "--no-protect"], "plan: expected no protect, which is part of the plan"),
        (["--eval-samples", "0"], "eval_samples: expected at least 1"),
    ],
)
def test_bad_input(checkpoint, capsys, more, message):
    assert drop_layers(checkpoint, "out", *more) == 2
    shown = capsys.readouterr().err
    assert message in shown and "Traceback" not in shown
