"""Commands with --max-memory: the same output as without it."""

import os
import re

import pytest

from hf_cod.cli.main import main
from hf_cod.io.report import RunReport
from tests.cli.runs import QUICK
from tests.tiny_models import build


@pytest.mark.parametrize(
    "command", ["prune --score angular", "quantize --bits 3.5", "drop-layers --no-speed --replacement none"]
)
def test_the_commands_write_the_same_in_both_ways(command, checkpoint, monkeypatch):
    build("llama_tied", hidden_size=128, intermediate_size=256).save_pretrained(checkpoint / "model")
    name, *more = command.split()
    words = [name, str(checkpoint / "model"), *more, "--text", str(checkpoint / "text.txt"), "--no-plots", *QUICK]
    words += ["--device", "cpu", "--eval-samples", "3"]
    assert main([*words, "--output", str(checkpoint / "memory" / "run")]) == 0
    assert main([*words, "--output", str(checkpoint / "files" / "run"), "--max-memory", "100GB"]) == 0
    memory, files = (
        {p.name: p.read_bytes() for p in (checkpoint / way / "run").iterdir()} for way in ("memory", "files")
    )
    reports = [RunReport.load(checkpoint / way / "run") for way in ("memory", "files")]
    told = reports[1].results.pop("memory_limit")
    assert told["limit_bytes"] == 100e9 and told["needed_bytes"] > 4e8 and told["peak_bytes"] > 2e8
    assert reports[0].results == reports[1].results and reports[0].settings == reports[1].settings
    assert memory.keys() == files.keys()
    different = {key for key in memory if memory[key] != files[key]}
    assert different <= {"report.json", "report.md", "README.md"}, "which have the time"


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("prune --recover-steps 1", "recover_steps"),
        ("prune --search", "search"),
        ("drop-layers", "replacement measured"),
    ],
)
def test_what_changes_weights_in_memory_is_refused(command, reason, checkpoint, capsys):
    name, *more = command.split()
    words = [name, str(checkpoint / "model"), *more, "--text", str(checkpoint / "text.txt"), "--device", "cpu", *QUICK]
    words += ["--max-memory", "100GB", "--output", str(checkpoint / "out")]
    assert main(words) == 2
    message = f"max_memory: expected none with {reason}, which needs all weights in memory"
    assert message in capsys.readouterr().err and "out" not in os.listdir(checkpoint)


def test_a_limit_that_cannot_be_kept_is_refused_before_any_work(checkpoint, capsys):
    words = ["prune", str(checkpoint / "model"), "--text", str(checkpoint / "text.txt"), "--device", "cpu", *QUICK]
    assert main([*words, "--max-memory", "100MB", "--output", str(checkpoint / "out")]) == 2
    found = re.search(r"max_memory: expected at least (\d+\.\d\d)GB, got 0.10GB \(", capsys.readouterr().err)
    assert found is not None and float(found[1]) > 0.4


def test_scores_are_the_same_in_both_ways(checkpoint):
    words = ["score", str(checkpoint / "model"), "--method", "owl", "--text", str(checkpoint / "text.txt")]
    words += ["--no-plots", "--device", "cpu", "--sequence-length", "32", "--max-samples", "2"]
    assert main([*words, "--output", str(checkpoint / "memory")]) == 0
    assert main([*words, "--output", str(checkpoint / "files"), "--max-memory", "100GB"]) == 0
    for name in ("scores.json", "statistics.safetensors"):
        assert (checkpoint / "memory" / name).read_bytes() == (checkpoint / "files" / name).read_bytes(), name
    reports = [RunReport.load(checkpoint / way) for way in ("memory", "files")]
    assert reports[1].results.pop("memory_limit")["limit_bytes"] == 100e9
    assert reports[0].results == reports[1].results and reports[0].settings == reports[1].settings
