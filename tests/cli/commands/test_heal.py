"""hf-cod heal on the embedded LNS model, a quarter of whose layers is gone."""

import math
import re

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from hf_cod import RunReport, drop, heal, perplexity
from hf_cod.cli import samples
from hf_cod.cli.main import main
from hf_cod.io.models import ModelSettings, embedded_model, load_model
from hf_cod.io.packing import pack
from hf_cod.io.text import embedded_text
from hf_cod.training.healing.settings import HealSettings
from tests.tiny_tokenizers import gpt_like
from tests.tiny_training import dies_in_step_five

TEACHER = embedded_model("lns")
QUICK = "--teacher-dtype float32 --steps 6 --batch-size 8 --micro-batch-size 4 --sequence-length 64 --eval-samples 8"
QUICK += " --save-every 2 --log-every 2 --dtype float32 --device cpu"
SAMPLED = "--n-active 3 --interval 2 --rank 8"


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    model, tokenizer = load_model(TEACHER, ModelSettings(dtype="float32", device="cpu"))
    drop(model, [5, 6, 7])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_healing_that_makes_the_model_worse_says_so(student, tmp_path, capsys):
    command = ["heal", student, "--teacher", TEACHER, *QUICK.split(), "--method", "full", "--no-speed"]
    assert main([*command, "--steps", "2", "--learning-rate", "0.5", "--output", str(tmp_path / "out")]) == 0
    report = RunReport.load(tmp_path / "out")
    assert report.results["recovered_share"] < 0 and report.notes[0].startswith("the training raised the perplexity")
    printed = " ".join(capsys.readouterr().out.split())
    assert "): nothing of the lost log-perplexity is recovered." in printed and "note: the training raised" in printed
    assert report.plot().axes[1].get_title() == "Healing: nothing of the lost log-perplexity recovered"


@pytest.mark.process
def test_a_killed_run_ends_as_one_that_was_not(student, tmp_path, capsys):
    command = ["heal", student, "--teacher", TEACHER, *QUICK.split(), *SAMPLED.split(), "--hidden", "0.1", "--output"]
    assert main([*command, str(tmp_path / "whole")]) == 0
    assert "of the lost log-perplexity is recovered" in " ".join(capsys.readouterr().out.split())
    dies_in_step_five([*command, str(tmp_path / "killed")])
    assert main([*command, str(tmp_path / "killed"), "--steps", "7"]) == 2
    assert "steps: expected 6, as in the run in" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "killed"), "--no-speed"]) == 0, "the same training"
    assert RunReport.load(tmp_path / "killed").results["speed"] == {}
    weights, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert weights.keys() == resumed.keys()
    assert all(torch.equal(resumed[name], value) for name, value in weights.items())
    report = RunReport.load(tmp_path / "whole")
    assert report.results["curve"] == RunReport.load(tmp_path / "killed").results["curve"]
    pictures = {path.name for path in (tmp_path / "whole").glob("*.png")}
    assert pictures == {"overview.png", "curve.png", "healed.png", "trained.png", "score.png"}
    weights, speed = report.results["layer_weights"], report.results["speed"]
    assert weights["healed"] == 0.75 * weights["teacher"]
    assert [*report.results["memory_bytes"]] == ["teacher", "healed"]
    assert report.results["training_memory"]["used_bytes"] > 0
    assert [*speed] == ["teacher", "healed"] and all(value > 0 for told in speed.values() for value in told.values())
    page = (tmp_path / "whole" / "report.md").read_text()
    assert "75.0% of the teacher's; the student takes" in page and "Tokens per second: " in page and "(teacher " in page
    found = report.results["perplexity"]
    lost, back = math.log(found["before"] / found["teacher"]), math.log(found["before"] / found["after"])
    assert lost > 0 and report.results["recovered_share"] == pytest.approx(back / lost)
    assert sum(report.layers["trained"]) == 3 * 6 and report.layers["teacher_layer"] == [0, 1, 2, 3, 4, 8, 9, 10, 11]
    model, tokenizer = load_model(str(tmp_path / "whole"), ModelSettings(device="cpu"))
    held_out = pack(tokenizer, [embedded_text()], 64)[-8:].long()
    again = perplexity(model, [{"input_ids": part} for part in held_out.split(4)])
    assert again == pytest.approx(found["after"], rel=1e-4)


def test_tokens_another_text_and_a_teacher_in_bfloat16(student, tmp_path, capsys):
    (tmp_path / "other.txt").write_text("It was a dark and stormy night; the rain fell in torrents. " * 80)
    command = (
        f"heal {student} --teacher {TEACHER} {QUICK} --method full --no-plots --tokens 1k --teacher-dtype bfloat16"
    )
    command = command.replace("--steps 6 ", "").replace("--teacher-dtype float32 ", "")
    files = ["--eval-text", str(tmp_path / "other.txt"), "--output", str(tmp_path / "out")]
    assert main([*command.split(), *files]) == 0
    report = RunReport.load(tmp_path / "out")
    assert report.settings["steps"] == 2 and report.results["tokens"] == 1024
    assert "tokens: 1k are 2 optimizer steps of" in capsys.readouterr().err
    tokenizer = AutoTokenizer.from_pretrained(student)
    other = pack(tokenizer, [(tmp_path / "other.txt").read_text()], 64)[:8].long()
    model, _ = load_model(str(tmp_path / "out"), ModelSettings(device="cpu"))
    measured = perplexity(model, [{"input_ids": part} for part in other.split(4)])
    assert measured == pytest.approx(report.results["perplexity"]["after"], rel=1e-4)


def test_another_tokenizer_is_refused(student, tmp_path, capsys):
    model, _ = load_model(TEACHER)
    model.save_pretrained(tmp_path / "other")
    gpt_like().save_pretrained(tmp_path / "other")
    command = ["heal", student, "--teacher", str(tmp_path / "other"), *QUICK.split(), "--no-plots", "--output"]
    assert main([*command, str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert "teacher: expected the student's tokenizer, with" in told
    assert not (tmp_path / "out").exists()
    assert re.search(r"'.+' (as \d+|missing), got another with \d+ tokens, '.+' (as \d+|missing)", told)


def test_the_directory_of_either_model_is_refused(student, capsys):
    for directory, message in ((student, "another directory than the model's"), (TEACHER, "which holds a model")):
        assert main(["heal", student, "--teacher", TEACHER, *QUICK.split(), "--no-plots", "--output", directory]) == 2
        assert message in capsys.readouterr().err


def test_scores_are_for_methods_that_draw_layers(student, tmp_path, capsys):
    (tmp_path / "s.json").write_text("{}")
    scores = str(tmp_path / "s.json")
    command = ["heal", student, "--teacher", TEACHER, *QUICK.split(), "--method", "full", "--scores", scores]
    assert main([*command, "--output", str(tmp_path / "out")]) == 2
    shown = capsys.readouterr().err
    assert "scores: expected none with full, which does not sample layers by scores, got " in shown
    assert not (tmp_path / "out").exists()


def test_each_model_is_loaded_in_its_own_revision(tmp_path, monkeypatch):
    asked = {}

    def load(name, loading, **_):
        asked[name] = loading.revision
        if len(asked) == 2:
            raise ValueError("model: enough")
        return None, None

    monkeypatch.setattr(samples, "load_with_tokenizer", load)
    more = ["--teacher-revision", "step1000", "--revision", "pruned", "--output", str(tmp_path / "out")]
    assert main(["heal", "mine/student", "--teacher", "its/teacher", *QUICK.split(), "--no-plots", *more]) == 2
    assert asked == {"mine/student": "pruned", "its/teacher": "step1000"}


@pytest.mark.slow
def test_a_real_model_without_five_layers_heals_in_a_few_steps(smollm2, brown_text):
    """Settings are the defaults but for size; text is read from its middle, figures come from its end."""
    teacher, tokenizer = load_model(smollm2, ModelSettings(dtype="float32"))
    model, _ = load_model(smollm2, ModelSettings(dtype="float32"))
    drop(model, [20, 21, 24, 25, 26])
    windows = pack(tokenizer, [brown_text[2_000_000:2_200_000]], 128)
    held_out = pack(tokenizer, [brown_text[-60_000:]], 128)[:16]
    chosen = HealSettings(method="full", steps=10, batch_size=4, micro_batch_size=4, sequence_length=128, save_every=10)
    found = heal(model, teacher, windows, chosen, held_out=held_out).results
    assert found["perplexity"]["teacher"] < found["perplexity"]["after"] < found["perplexity"]["before"]
