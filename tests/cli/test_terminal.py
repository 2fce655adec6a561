"""What a person sees: one progress bar at a time and none that is torn, no escape sequences where none are wanted."""

import re

import pytest

from hf_cod.compression.fit.knobs import describe_steps
from hf_cod.io.report import RunReport
from hf_cod.layers.checks import name_of
from hf_cod.layers.stack import find_decoder_layers
from hf_cod.scoring.layer_scores import LayerScores
from hf_cod.scoring.methods import score_layers
from tests.fresh_processes import run_fresh
from tests.terminals import Shown, run_on_terminal
from tests.tiny_models import build
from tests.tiny_tokenizers import gpt_like

pytestmark = pytest.mark.process
BAR = re.compile(r"\d+%\|.*")
WHOLE_BAR = re.compile(r"(.*: )?100%\|█+\| (\d+)/\2 \[.*\]")
COMMANDS = {
    "finetune": "--steps 6 --batch-size 4 --micro-batch-size 2 --n-active 1 --interval 2 --rank 4 --save-every 3 "
    "--log-every 3 --dtype float32",
    "prune": "--max-samples 4 --batch-size 2 --recover-steps 5",
    "quantize": "--max-samples 4 --batch-size 2 --bits 4",
    "drop-layers": "--max-samples 8 --batch-size 2 --n-removed 2 --no-speed",
    "fit": "--max-samples 4 --tuning-samples 4 --batch-size 2 --parameter-share 0.6 --no-speed",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("terminal")
    build("llama").save_pretrained(folder / "model")
    gpt_like().save_pretrained(folder / "model")
    (folder / "text.txt").write_text("one two three four five six seven eight nine ten " * 60)
    return folder


def command(folder, name, output, *more):
    samples = ["--sequence-length", "8", "--eval-samples", "4", "--no-plots", *COMMANDS[name].split()]
    return [name, folder / "model", "--text", folder / "text.txt", "--output", output, *samples, *more]


def bars(lines):
    return [line for line in lines if BAR.search(line)]


def test_a_bar_below_another_and_a_torn_one_would_be_seen():
    nested = Shown(0, "\router:  10%|█  | 1/9\n\rinner:  50%|█  | 1/2\x1b[A\r\nx\x1b[A\r")
    assert max(len(bars(lines)) for lines in nested.screens()) == 2
    assert nested.last == ["outer:  10%|█  | 1/9", "xnner:  50%|█  | 1/2"]
    assert not any(WHOLE_BAR.fullmatch(line) for line in bars(nested.last))


@pytest.mark.parametrize("name", COMMANDS)
def test_one_progress_bar_at_a_time(name, folder, tmp_path):
    shown = run_on_terminal(*command(folder, name, tmp_path / "out"))
    assert shown.status == 0, shown.written
    most = max(shown.screens(), key=lambda lines: len(bars(lines)))
    assert len(bars(most)) == 1, most
    assert all(WHOLE_BAR.fullmatch(line) for line in bars(shown.last)), shown.last
    assert any("Perplexity goes from" in line for line in shown.last) and "\x1b[1m" in shown.written
    if name == "finetune":
        records = [line for line in shown.last if line.startswith("step ")]
        assert [line.partition(": loss ")[0] for line in records] == ["step 3 of 6", "step 6 of 6"]
    assert not any(line.startswith("{") for line in shown.last)


@pytest.mark.parametrize("name", ["finetune", "prune"])
def test_no_bars_and_no_styles_where_variables_say_so(name, folder, tmp_path):
    variables = {"NO_COLOR": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    shown = run_on_terminal(*command(folder, name, tmp_path / "out"), environment=variables)
    assert shown.status == 0 and "Perplexity goes from" in shown.written
    assert "\x1b" not in shown.written and not BAR.search(shown.written)


@pytest.mark.parametrize("name", ["finetune", "prune"])
def test_quiet_prints_nothing(name, folder, tmp_path):
    shown = run_on_terminal(*command(folder, name, tmp_path / "out", "--quiet"))
    assert (shown.status, shown.written) == (0, "") and (tmp_path / "out" / "report.json").is_file()
    failed = run_on_terminal(*command(folder, name, folder / "model", "--quiet"))
    assert failed.status == 2 and "error: output: expected" in failed.written


def test_without_a_terminal_nothing_is_wrapped_cut_or_styled(folder, tmp_path):
    code = "import sys; from hf_cod.cli.main import main; sys.exit(main(sys.argv[1:]))"
    done = run_fresh(code, *command(folder, "fit", tmp_path / "out"), environment={"COLUMNS": "40"})
    assert done.returncode == 0 and done.stderr == ""
    assert not re.search(r"[\r\x1b…]", done.stdout) and not BAR.search(done.stdout)
    lines, report = done.stdout.splitlines(), RunReport.load(tmp_path / "out")
    assert max(map(len, report.summary)) > 100
    assert all(f"• {line}" in lines for line in report.summary) and all(f"note: {n}" in lines for n in report.notes)
    for row in report.results["plan"]["tried"]:
        told = describe_steps(row["steps"])
        assert any(line.split("  ")[1] == told for line in lines if line.startswith("  ")), told


def test_scores_of_another_model_of_the_same_sizes_are_reported_once(folder, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    sizes = score_layers(model, method="uniform").parameters
    file = LayerScores("some/other", "mine", [1.0, 2.0, 3.0, 4.0], sizes).save(tmp_path / "scores.json")
    shown = run_on_terminal(*command(folder, "prune", tmp_path / "out", "--scores", file))
    mine = name_of(find_decoder_layers(model))
    told = (
        f"hf-cod prune: warning: scores: used on {mine}, but computed for some/other, "
        "which has layers of the same sizes\r\n"
    )
    assert shown.status == 0 and shown.written.count("some/other") == 1
    assert told in shown.written
