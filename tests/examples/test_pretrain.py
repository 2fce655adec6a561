"""The two pre-training examples, through their command lines, on the embedded text."""

import importlib.util
import json
import math
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_cod.io.report import RunReport
from hf_cod.io.text import embedded_text
from hf_cod.training.pretraining.checkpoints import PROGRESS
from hf_cod.training.pretraining.preparation import prepare
from hf_cod.training.pretraining.recipes import PretrainSettings
from tests.fresh_processes import run_fresh

EXAMPLES = Path(__file__).parents[2] / "examples"
STEPS = 8
QUICK = f"--steps {STEPS} --batch-size 2 --micro-batch-size 1 --sequence-length 16 --precision float32 --log-every 1"
QUICK += " --save-every 2 --evaluate-every 4 --diagnose-every 3 --validation-samples 4 --norm-placement mix"
BOTH = ["pretrain", "pretrain_accelerate"]
ONE_QUICKLY = ["pretrain", pytest.param("pretrain_accelerate", marks=pytest.mark.slow)]

# Dies in the middle of an optimizer step, after the weights have changed.
DIES = """
import os, torch
last, steps, step = int(os.environ["DIES_AT"]), [0], torch.optim.AdamW.step
def dies(self, *args, **kwargs):
    steps[0] += 1
    step(self, *args, **kwargs)
    if steps[0] == last: os._exit(9)
torch.optim.AdamW.step = dies
"""
# accelerate shards on accelerators alone: here the CPU passes for one.
SHARDS = """
from accelerate.state import DistributedType, PartialState
init = PartialState.__init__
def on_accelerator(self, *args, **kwargs):
    init(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU: self.distributed_type = DistributedType.MULTI_XPU
PartialState.__init__ = on_accelerator
"""
RUNS = """
import os, runpy, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(autouse=True)
def _no_cache_of_the_user(tmp_path, monkeypatch):
    """Prepared text goes where the test ends."""
    cached = lambda library_name, namespace, subfolder: tmp_path / "cache" / namespace / subfolder  # noqa: E731
    monkeypatch.setattr("hf_cod.training.pretraining.preparation.cached_assets_path", cached)
    monkeypatch.setenv("HF_ASSETS_CACHE", str(tmp_path / "assets"))  # of the processes that a test starts


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look their own module up
    spec.loader.exec_module(module)
    return module


def run(name, output, *more):
    example(name).main([*QUICK.split(), "--output", str(output), *more])
    return found(output)


def dies(name, step, *more):
    """A run in a process that is gone in the middle of that step."""
    return run_fresh(DIES + RUNS, EXAMPLES / f"{name}.py", *QUICK.split(), *more, environment={"DIES_AT": str(step)})


def found(output):
    """Report, weights and history of the layers."""
    history = (output / "layer_diagnostics" / "history.jsonl").read_text().splitlines()
    return RunReport.load(output), load_file(output / "model.safetensors"), [json.loads(x) for x in history]


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(embedded_text()[:20_000])
    return ["--text", str(tmp_path / "text.txt")]


@pytest.mark.process
@pytest.mark.parametrize("name", BOTH)
def test_a_killed_run_ends_as_one_that_was_not(name, tmp_path, text, caplog):
    report, weights, history = run(name, tmp_path / "whole", *text)
    assert [step for step, _ in report.results["curve"]] == list(range(1, STEPS + 1))
    assert [step for step, _ in report.results["validation"]] == [4, 8]
    dies_at = random.randint(3, STEPS - 1)  # a random step, on purpose: any must do
    killed = dies(name, dies_at, *text, "--output", tmp_path / "killed")
    assert killed.returncode == 9, killed.stderr[-2000:]
    assert not (tmp_path / "killed" / "report.json").exists()
    resumed, resumed_weights, resumed_history = run(name, tmp_path / "killed", *text)
    assert "is damaged" not in caplog.text
    assert resumed.results == report.results and resumed.layers == report.layers, f"killed at step {dies_at}"
    assert resumed_history == history
    for key, value in weights.items():
        assert torch.equal(resumed_weights[key], value), (key, dies_at)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def of_another_model(path):
    tensors = load_file(path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()
    save_file(tensors, path, {"format": "pt"})


DAMAGES = {
    "pretrain": [("model.safetensors", of_another_model), ("optimizer.pt", cut), ("rng_state.pth", cut)],
    "pretrain_accelerate": [("model.safetensors", of_another_model), ("optimizer.bin", cut), (PROGRESS, cut)],
}


@pytest.mark.process
@pytest.mark.parametrize("name", BOTH)
def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(name, tmp_path, text, caplog):
    _, weights, _ = run(name, tmp_path / "whole", *text)
    assert dies(name, 5, *text, "--output", tmp_path / "killed").returncode == 9
    for number, (file, damage) in enumerate(DAMAGES[name]):
        shutil.copytree(tmp_path / "killed", tmp_path / str(number))
        damage(tmp_path / str(number) / "checkpoint-4" / file)
        caplog.clear()
        _, resumed, _ = run(name, tmp_path / str(number), *text)
        (told,) = [message for message in caplog.messages if "is damaged" in message]
        assert "training resumes from checkpoint-2" in told
        assert all(torch.equal(resumed[key], value) for key, value in weights.items()), file


@pytest.mark.process
@pytest.mark.parametrize("name", BOTH)
def test_micro_batches_of_another_size_resume(name, tmp_path, text, caplog):
    assert dies(name, 8, *text, "--output", tmp_path / "killed").returncode == 9
    run(name, tmp_path / "killed", *text, "--micro-batch-size", "2")
    assert "is damaged" not in caplog.text


@pytest.mark.process
@pytest.mark.parametrize("name", ONE_QUICKLY)
def test_streamed_text_is_read_again_and_again_and_a_killed_run_finds_its_place(name, tmp_path, monkeypatch):
    rows = [{"text": part} for part in embedded_text()[:1500].split("\n\n") if part]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = ["--text", str(tmp_path / "rows.jsonl"), "--validation-text", str(tmp_path / "rows.jsonl"), "--stream"]
    text += ["--steps", "24", "--save-every", "4"]  # 48 windows; the text has fewer
    _, weights, _ = run(name, tmp_path / "whole", *text)
    killed = dies(name, 22, *text, "--output", tmp_path / "killed")
    assert killed.returncode == 9, killed.stderr[-2000:]
    _, resumed, _ = run(name, tmp_path / "killed", *text)
    for key, value in weights.items():
        assert torch.equal(resumed[key], value), key


@pytest.mark.process
@pytest.mark.parametrize("name", ONE_QUICKLY)
def test_losses_between_logs_are_not_lost_with_a_kill(name, tmp_path, text):
    """Checkpoints fall on logged steps, so that the curve is that of a run that was not killed."""
    text = [*text, "--log-every", "2", "--save-every", "4", "--diagnose-every", "50"]
    report, _, _ = run(name, tmp_path / "whole", *text)
    assert dies(name, 7, *text, "--output", tmp_path / "killed").returncode == 9
    resumed, _, _ = run(name, tmp_path / "killed", *text)
    assert resumed.results["curve"] == report.results["curve"]
    with pytest.raises(ValueError, match=r"save_every: expected a multiple of log_every \(3\)"):
        run(name, tmp_path / "bad", "--log-every", "3", "--save-every", "4")


@pytest.mark.parametrize("steps, warned", [(40, False), (1000, True)])
def test_many_passes_over_few_samples_are_warned_of(steps, warned, tmp_path, text, caplog):
    """Before the training, as fine-tuning does."""
    (tmp_path / "text.txt").write_text(embedded_text()[:2000])
    few = {"sequence_length": 16, "batch_size": 1, "micro_batch_size": 1, "validation_samples": 4, "steps": steps}
    prepared = prepare(PretrainSettings(text=text[1], output=str(tmp_path / "run"), **few))
    samples = len(prepared.train.windows)
    told = f"steps: {steps} are {round(steps / samples)} passes over the {samples} training samples, which"
    assert (told in caplog.text) == warned


def test_another_run_does_not_go_on_in_the_same_directory(tmp_path, text):
    report, _, _ = run("pretrain", tmp_path / "run", *text)
    for change, told in (
        (["--learning-rate", "0.5"], "learning_rate: expected 0.002, .*got 0.5"),
        (["--steps", "4"], "steps: expected 8, .*got 4"),
        (["--precision", "bf16"], "precision: expected 'float32', .*got 'bf16'"),
    ):
        with pytest.raises(ValueError, match=told):
            run("pretrain", tmp_path / "run", *text, *change)
    Path(text[1]).write_text(embedded_text()[:30_000])
    with pytest.raises(ValueError, match=r"text_size: expected \[\d+\], .*set another --output"):
        run("pretrain_accelerate", tmp_path / "run", *text)
    assert RunReport.load(tmp_path / "run") == report


def test_directories_of_the_same_name_are_not_the_same_text(tmp_path, monkeypatch):
    found = []
    for name, words in (("a", "one two three "), ("b", "four five six ")):
        (tmp_path / name / "corpus").mkdir(parents=True)
        (tmp_path / name / "corpus" / "part.txt").write_text(words * 400)
        monkeypatch.chdir(tmp_path / name)
        settings = PretrainSettings(text="./corpus", output=str(tmp_path / name / "out"), sequence_length=16)
        prepared = prepare(settings)
        found.append(prepared.tokenizer.decode(prepared.train[0]["input_ids"]))
    assert "one" in found[0] and "five" in found[1]


def test_a_tokenizer_that_cannot_be_read_is_an_error(tmp_path, text):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text("5")
    with pytest.raises(ValueError, match="tokenizer: expected tokenizer files that transformers can read, got "):
        run("pretrain", tmp_path / "run", *text, "--tokenizer", str(tmp_path / "tokenizer"))


def test_both_loops_come_to_the_same_weights(tmp_path, text):
    reports, weights, histories = zip(*[run(name, tmp_path / name, *text) for name in BOTH], strict=True)
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, atol=1e-5, rtol=1e-4)
    assert reports[0].results["validation_perplexity"] == pytest.approx(reports[1].results["validation_perplexity"])
    assert [line["step"] for line in histories[0][1:]] == [line["step"] for line in histories[1][1:]] == [1, 3, 6, 8]
    curves = [torch.tensor(report.results["curve"]) for report in reports]
    torch.testing.assert_close(*curves, atol=1e-4, rtol=1e-4)


def test_schedule_is_warm_up_and_cosine_to_a_tenth(tmp_path, text):
    """Against the formula, at every step."""
    run("pretrain_accelerate", tmp_path / "run", *text, "--learning-rate", "1.0", "--steps", "20", "--save-every", "20")
    progress = json.loads((tmp_path / "run" / "checkpoint-20" / "progress.json").read_text())
    rates = [entry["learning_rate"] for entry in progress["history"] if "learning_rate" in entry]
    for step, rate in enumerate(rates, start=1):  # the rate of the next step, as the schedule stands after this one
        cosine = 0.1 + 0.9 * (1 + torch.cos(torch.tensor(torch.pi * (step - 2) / 18))) / 2
        assert rate == pytest.approx(step / 2 if step < 2 else float(cosine), abs=1e-6)


@pytest.mark.parametrize("name", BOTH)
def test_the_saved_model_loads_and_generates(name, tmp_path, text):
    report, _, _ = run(name, tmp_path / "run", *text, "--steps", "2")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert model.config.norm_placement == "mix" and model.config.use_cache
    assert model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False).shape == (1, 6)
    assert len(report.layers["variance"]) == 12 and report.results["validation_tokens"] == 4 * 16
    assert report.settings["norm_placement"] == "mix" and report.settings["learning_rate"] == 2e-3


def launch(script, *arguments, more=()):
    """By accelerate launch, in two processes."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", *more, str(script), *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True)


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("name", BOTH)
def test_two_processes_train_as_one(name, tmp_path, text):
    _, alone, _ = run(name, tmp_path / "alone", *text)
    done = launch(EXAMPLES / f"{name}.py", *QUICK.split(), *text, "--output", tmp_path / "two", more=["--cpu"])
    assert done.returncode == 0, done.stderr[-3000:]
    _, together, _ = found(tmp_path / "two")
    for key, value in alone.items():
        torch.testing.assert_close(together[key], value, atol=1e-5, rtol=1e-4)


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("name", BOTH)
def test_shards_train_as_one_and_resume(name, tmp_path, text, monkeypatch):
    """FSDP2, killed in the middle, against one process that was not."""
    alone, weights, history = run(name, tmp_path / "alone", *text)
    monkeypatch.setenv("DIES_AT", "5")
    (tmp_path / "dies.py").write_text(DIES + SHARDS + RUNS)
    (tmp_path / "runs.py").write_text(SHARDS + RUNS)
    arguments = [EXAMPLES / f"{name}.py", *QUICK.split(), *text, "--output", tmp_path / "two"]
    fsdp = ["--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"]
    assert launch(tmp_path / "dies.py", *arguments, more=fsdp).returncode != 0
    assert (tmp_path / "two" / "checkpoint-4").exists() and not (tmp_path / "two" / "report.json").exists()
    done = launch(tmp_path / "runs.py", *arguments, more=fsdp)
    assert done.returncode == 0, done.stderr[-3000:]
    report, together, sharded_history = found(tmp_path / "two")
    for key, value in weights.items():
        torch.testing.assert_close(together[key], value, atol=1e-5, rtol=1e-4)
    assert report.results["validation_perplexity"] == pytest.approx(alone.results["validation_perplexity"], rel=1e-4)
    assert [line["step"] for line in sharded_history[1:]] == [line["step"] for line in history[1:]]
    for ours, theirs in zip(sharded_history[1:], history[1:], strict=True):
        assert ours["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-3)
        assert ours["variance"] == pytest.approx(theirs["variance"], rel=1e-3)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "two").config.norm_placement == "mix"


def test_the_comparison_takes_each_placement_at_its_best_rate_and_skips_what_is_done(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    comparison = example("compare_placements")
    trained = []

    def pretrain(settings):
        """What a run would leave; pre is best at 1e-2, lns at 1e-3, post diverges with seed 1."""
        trained.append(settings.output)
        rate, seed, name = settings.learning_rate, settings.seed, settings.norm_placement
        value = 10.0 + seed + (5 if (rate == 1e-2) == (name == "lns") else 0)
        diverged = name == "post" and seed == 1
        report = RunReport("pretrain", name, {}, {}, {"variance": [1.0, 2.0 + seed]}, {"late_share": 0.5})
        report.results["validation_perplexity"] = math.nan if diverged else value
        report.results["effective_depth"] = {"value": 6.0}
        if diverged:
            report.layers.clear()
        report.save(settings.output)

    def in_this_process(wanted, jobs):
        for settings in wanted:
            if comparison.report_of(Path(settings.output)) is None:
                pretrain(settings)

    monkeypatch.setattr(comparison, "train_all", in_this_process)
    arguments = ["--directory", str(tmp_path / "runs"), "--placements", "pre", "lns", "post"]
    arguments += ["--learning-rates", "1e-3", "1e-2", "--grid-steps", "3", "--steps", "4", "--seeds", "2"]
    comparison.main(arguments)
    assert len(trained) == len(set(trained)) == 3 * 2 + 3 * 2
    comparison.main(arguments)
    assert len(trained) == 12, "nothing is trained twice"
    rows = json.loads((tmp_path / "runs" / "comparison.json").read_text())["placements"]
    assert {name: row["learning_rate"] for name, row in rows.items()} == {"pre": 1e-2, "lns": 1e-3, "post": 1e-2}
    assert rows["lns"]["validation perplexity"] == {"mean": 10.5, "spread": pytest.approx(0.5**0.5), "values": [10, 11]}
    assert rows["lns"]["last layer's variance"]["mean"] == 2.5 and rows["lns"]["diverged"] == 0
    assert rows["post"]["diverged"] == 1 and rows["post"]["validation perplexity"]["spread"] is None
    assert "| lns | 0.001 | 2 of 2 | 10.5 ± 0.7071 | 2.5 ± 0.7071 | 6 ± 0 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "told"),
    [("checkpoint-7", "which holds checkpoint-7 of another run"), ("config.json", "which holds a model")],
)
def test_a_directory_of_something_else_is_refused(name, told, tmp_path):
    (tmp_path / name / "mine").mkdir(parents=True)
    with pytest.raises(ValueError, match=f"output: expected a new directory, .*{told}"):
        prepare(PretrainSettings(output=str(tmp_path)))
