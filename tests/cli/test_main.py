"""What all commands share: errors, options, names, help."""

import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from hf_cod.cli.main import COMMANDS, main
from hf_cod.io.interruption import Interruptions
from hf_cod.io.report import RunReport
from hf_cod.scoring.layer_scores import LayerScores
from tests.cli.runs import QUICK, TEXT
from tests.tiny_models import build
from tests.tiny_tokenizers import gpt_like

USUAL = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


@pytest.mark.parametrize("command", ["factorize", "narrow"])
@pytest.mark.parametrize(
    "file, message",
    [("other.json", "scores: expected those of a model with"), ("none.json", "scores: expected a file")],
)
def test_scores_are_checked_before_anything_is_measured(checkpoint, capsys, monkeypatch, command, file, message):
    monkeypatch.setattr("transformers.LlamaForCausalLM.forward", lambda *a, **k: pytest.fail("measured already"))
    monkeypatch.chdir(checkpoint)
    LayerScores("m", "mine", [1.0, 2.0, 3.0, 4.0], [7] * 4).save("other.json")
    arguments = [command, "model", "--text", "text.txt", "--output", "out", "--scores", file, *QUICK]
    assert main(arguments) == 2
    assert message in capsys.readouterr().err and not (checkpoint / "out").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["diagnose", "no/such-model"], "model: expected a Hub id"),
        (["diagnose", "./no-such-model"], "which does not exist"),
        (["compare", "a", "b"], "runs: expected"),
        (
            ["fly"],
            "drop-layers, repeat-layers, drop-experts, pack, quantize, export, fit, heal, finetune, compare, report, "
            "card, convert, env, got 'fly'",
        ),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, capsys):
    assert main(arguments) == 2
    shown = capsys.readouterr().err
    assert message in shown and "Traceback" not in shown


@pytest.mark.parametrize(
    "command, more",
    [("factorize", []), ("score", []), ("finetune", []), ("heal", ["--teacher"])],
)
def test_samples_longer_than_the_positions_of_a_model(tmp_path, capsys, command, more):
    build("gpt2").save_pretrained(tmp_path / "model")
    gpt_like().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    model, text, out = (str(tmp_path / name) for name in ("model", "text.txt", "out"))
    more = [*more, str(shutil.copytree(model, tmp_path / "teacher"))] if more else []
    assert main([command, model, *more, "--text", text, "--sequence-length", "65", "--output", out]) == 2
    assert "sequence_length: expected at most 64 tokens, the learned positions of transformer.wpe, got 65" in (
        capsys.readouterr().err
    )


def test_a_model_is_no_text_and_a_file_no_output(checkpoint, capsys):
    model, text = str(checkpoint / "model"), str(checkpoint / "text.txt")
    assert main(["factorize", model, "--text", model, "--output", str(checkpoint / "out")]) == 2
    assert "text: expected a text file or a dataset name" in capsys.readouterr().err
    assert main(["factorize", model, "--text", text, "--output", text]) == 2
    assert "output: expected a directory, got the file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command, told",
    [
        ("prunne", "hf-cod: did you mean prune\\? expected one of demo, .*, got 'prunne'"),
        ("drop_layers m", "hf-cod: did you mean drop-layers\\? expected one of demo, .*, got 'drop_layers'"),
        ("--verison", "hf-cod: did you mean --version\\? expected one of demo, .*, got '--verison'"),
        (
            "prune m --method wandaa",
            "hf-cod prune: error: method: did you mean wanda\\? expected .*, got 'wandaa'",
        ),
        (
            "finetune m --method lor",
            "hf-cod finetune: error: method: did you mean lora\\? expected .*, got 'lor'",
        ),
        ("xyzzy", "hf-cod: expected one of demo, .*, got 'xyzzy'"),
        (
            "prune m --sparcity 0.5",
            "hf-cod prune: error: unrecognized arguments: --sparcity 0.5; did you mean --sparsity\\?",
        ),
        (
            "diagnose m --max-sample-s 3",
            "hf-cod diagnose: error: unrecognized arguments: --max-sample-s 3; did you mean --max-samples\\?",
        ),
        ("prune", "hf-cod prune: error: the following arguments are required: model; put it before the options"),
        ("prune m --sparsity", "hf-cod prune: error: argument --sparsity: expected one argument"),
    ],
)
def test_a_wrong_command_line_is_one_line_with_the_nearest_name(command, told, capsys):
    try:
        status = main(command.split())
    except SystemExit as done:
        status = done.code
    shown = capsys.readouterr()
    assert status == 2 and not shown.out and re.fullmatch(f"{told}\n", shown.err)


def test_options_have_one_spelling(capsys):
    with pytest.raises(SystemExit):
        main(["diagnose", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "--text-column" in shown and "--pack, --no-pack join the texts and cut them" in shown
    assert "_column" not in shown and "--no_" not in shown and "default: None" not in shown
    assert "(default: 256)" in shown and "(default: 0)" in shown
    assert "--trust-remote-code run the custom code" in shown and "TRUST_REMOTE_CODE" not in shown


def test_arguments_may_stand_behind_options(checkpoint):
    """A boolean takes no value, so not the model's name either; and what is on stays on."""
    out, text = str(checkpoint / "out"), str(checkpoint / "text.txt")
    arguments = ["score", "--text", text, *QUICK, "--no-plots", "--per-module", str(checkpoint / "model")]
    assert main([*arguments, "--output", out]) == 0
    settings = RunReport.load(out).settings
    assert settings["per_module"] is True and settings["pack"] is True
    assert not (checkpoint / "out" / "score.png").exists()


def test_help(capsys):
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in COMMANDS)
    assert "If you do not know which one you need, use fit with a budget" in shown
    for name in COMMANDS:
        with pytest.raises(SystemExit) as done:
            main([name, "--help"])
        assert done.value.code == 0
    assert "--sequence-length" in capsys.readouterr().out


def stopped_in_an_import(stop):
    """As extension modules do that are interrupted while they are imported."""
    try:
        stop()
    except KeyboardInterrupt as error:
        raise ImportError("initialization failed") from error


def stopped_in_a_conversion(stop):
    """As matplotlib's do, which take what a Python method returns."""
    try:
        stop()
    except KeyboardInterrupt:
        error = ValueError("Invalid bounding box")
    raise error


@pytest.mark.parametrize("place", [lambda stop: stop(), stopped_in_an_import, stopped_in_a_conversion])
@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_command_says_how_it_resumes_and_leaves_nothing_half(
    number, status, place, checkpoint, capsys, monkeypatch
):
    stop = lambda *_, **__: place(partial(os.kill, os.getpid(), number))  # noqa: E731
    before = {each: signal.signal(each, usual) for each, usual in USUAL.items()}  # workers of xdist ignore one
    prune = ["prune", str(checkpoint / "model"), "--text", str(checkpoint / "text.txt"), "--output", "out", *QUICK]
    monkeypatch.chdir(checkpoint)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(LlamaForCausalLM, "save_pretrained", stop)
            assert main(prune) == status
        assert signal.getsignal(number) is USUAL[number]
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    assert "hf-cod prune: stopped; the same command resumes" in capsys.readouterr().err
    assert not (checkpoint / "out" / "journal" / "result").exists()
    assert main(prune) == 0


def test_an_error_after_an_interruption_is_told():
    """Such as that of a disk that is full while a checkpoint is saved."""
    before, interruptions = signal.signal(signal.SIGTERM, signal.SIG_DFL), Interruptions()
    try:
        with interruptions.raised():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            except KeyboardInterrupt:
                raise OSError("No space left on device")  # noqa: B904 - as in code that does not know
    except OSError as error:
        assert interruptions.behind(error) is None
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.process
@pytest.mark.parametrize("arguments", [["--help"], ["prune", "--help"], ["env", "--print-config"]])
def test_a_reader_that_ends_early_gets_no_traceback(arguments):
    """As in `hf-cod --help | head -3`."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "hf_cod", *arguments]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert done.returncode in (0, 1) and done.stderr.count(b"\n") <= 1, done.stderr.decode()


@pytest.mark.process
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_output_that_cannot_be_written_is_an_error_in_one_line():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "hf_cod", "--help"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=False, text=True)
    assert done.returncode == 1 and done.stderr.startswith("hf-cod: error: ") and done.stderr.count("\n") == 1
