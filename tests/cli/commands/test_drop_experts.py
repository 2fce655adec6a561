import pytest
import torch

from hf_cod import ExpertPlan, find_decoder_layers, perplexity
from hf_cod.cli.main import main
from hf_cod.io.models import load_model
from hf_cod.io.report import RunReport, format_number
from hf_cod.io.text import SampleSettings, token_batches
from hf_cod.layers.removal.experts import mixtures_of
from tests.tiny_models import build_mixture
from tests.tiny_tokenizers import gpt_like

TEXT = "one two three four five six seven eight nine ten " * 40
QUICK = ["--sequence-length", "8", "--max-samples", "4", "--batch-size", "2", "--eval-samples", "5"]


@pytest.fixture
def checkpoint(tmp_path):
    build_mixture("mixtral").save_pretrained(tmp_path / "model")
    gpt_like().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def drop_experts(folder, output, *more):
    text = ["--text", str(folder / "text.txt"), "--output", str(folder / output)]
    return main(["drop-experts", str(folder / "model"), *text, *QUICK, *more])


def test_what_is_written_is_a_stock_model_and_its_report_is_true(checkpoint, capsys):
    source = {path.name: path.read_bytes() for path in (checkpoint / "model").iterdir()}
    assert drop_experts(checkpoint, "out", "--share", "0.5", "--method", "frequency") == 0
    names = {path.name for path in (checkpoint / "out").iterdir()}
    assert {"model.safetensors", "expert_plan.json", "report.md", "README.md", "removed_token_share.png"} <= names
    assert {p.name: p.read_bytes() for p in (checkpoint / "model").iterdir()} == source
    report, shown = RunReport.load(checkpoint / "out"), capsys.readouterr().out
    model, tokenizer = load_model(str(checkpoint / "out"))
    assert model.config.num_local_experts == 2 and type(model).__module__.startswith("transformers.")
    plan = ExpertPlan.load(checkpoint / "out" / "expert_plan.json")
    assert plan.n_removed == 2 and report.results["removed_experts"] == plan.removed
    assert report.layers["experts"] == [4] * 4 and report.layers["experts_left"] == [2] * 4
    assert report.layers["removed_token_share"] == [*plan.removed_token_shares().values()]
    assert sum(p.numel() for p in model.parameters()) == report.results["parameters"]["dropped"]
    assert report.settings["method"] == "frequency" and report.settings["share"] == 0.5
    found = report.results["perplexity"]
    assert f"from {format_number(found['intact'])} to {format_number(found['dropped'])}, on " in shown
    assert "2 of 4 experts of each mixture are removed" in shown
    drawn = token_batches(tokenizer, TEXT, SampleSettings(sequence_length=8, max_samples=9, batch_size=1))
    assert perplexity(model, drawn[4:]) == pytest.approx(found["dropped"], rel=1e-5), "the later samples"


def test_an_earlier_plan_and_merging(checkpoint):
    assert drop_experts(checkpoint, "out", "--no-plots", "--no-speed") == 0
    plan = checkpoint / "out" / "expert_plan.json"
    assert drop_experts(checkpoint, "two", "--plan", str(plan), "--merge", "--no-plots", "--no-speed") == 0
    one, two = (load_model(str(checkpoint / name))[0] for name in ("out", "two"))
    assert one.config.num_local_experts == 3, "a quarter by default"
    report = RunReport.load(checkpoint / "two")
    assert all(len(merged) == 1 for merged in report.results["merged_experts"].values())
    assert report.settings["share"] == 0.25 and report.settings["method"] == "reap" and report.settings["merge"]
    gates = [[e.router.module.weight for e in mixtures_of(find_decoder_layers(m)).values()] for m in (one, two)]
    assert all(torch.equal(a, b) for a, b in zip(*gates, strict=True))
    assert not all(torch.equal(p, one.state_dict()[name]) for name, p in two.state_dict().items())


@pytest.mark.parametrize(
    "more, message",
    [
        (["--share", "0.1"], "share: expected at least 0.25, which removes 1 of 4 experts, got 0.1"),
        (["--share", "0.9"], "experts: expected at least one expert to be left"),
        (["--share", "1"], "share: expected a share between 0 and 1, got 1"),
        (["--threshold", "3"], "threshold: expected none with method reap"),
        (["--plan", "none.json"], "plan: expected a file, got 'none.json'"),
    ],
)
def test_bad_input(checkpoint, more, message, capsys):
    assert drop_experts(checkpoint, "out", *more) == 2
    assert message in capsys.readouterr().err and not (checkpoint / "out" / "model.safetensors").exists()


def test_a_plan_has_the_share_and_a_dense_model_has_no_experts(checkpoint, capsys):
    from tests.tiny_models import build

    assert drop_experts(checkpoint, "out", "--no-plots", "--no-speed") == 0
    plan = str(checkpoint / "out" / "expert_plan.json")
    assert drop_experts(checkpoint, "two", "--plan", plan, "--share", "0.5") == 2
    assert "share: expected none with a plan, which has the experts to remove" in capsys.readouterr().err
    build("llama").save_pretrained(checkpoint / "model")
    assert drop_experts(checkpoint, "two") == 2
    assert "model: expected a mixture of experts, got " in capsys.readouterr().err
