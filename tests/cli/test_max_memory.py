"""Commands with --max-memory: the same output as without it."""

import os

import pytest

from hf_cod.cli.main import main
from hf_cod.io.report import RunReport
from tests.cli.runs import QUICK
from tests.tiny_models import build


@pytest.mark.parametrize("command", ["prune --score angular", "quantize --bits 3.5"])
def test_the_commands_write_the_same_in_both_ways(command, checkpoint, monkeypatch):
    build("llama_tied", hidden_size=128, intermediate_size=256).save_pretrained(checkpoint / "model")
    name, *more = command.split()
    words = [name, str(checkpoint / "model"), *more, "--text", str(checkpoint / "text.txt"), "--no-plots", *QUICK]
    words += ["--device", "cpu", "--eval-samples", "3"]
    assert main([*words, "--output", str(checkpoint / "memory" / "run")]) == 0
    assert main([*words, "--output", str(checkpoint / "files" / "run"), "--max-memory", "1KB"]) == 0
    memory, files = (
        {p.name: p.read_bytes() for p in (checkpoint / way / "run").iterdir()} for way in ("memory", "files")
    )
    reports = [RunReport.load(checkpoint / way / "run") for way in ("memory", "files")]
    assert reports[0].results == reports[1].results and reports[0].settings == reports[1].settings
    assert memory.keys() == files.keys()
    different = {key for key in memory if memory[key] != files[key]}
    assert different <= {"report.json", "report.md", "README.md"}, "which have the time"


def test_recovery_requires_weights_in_memory(checkpoint, capsys):
    words = ["prune", str(checkpoint / "model"), "--text", str(checkpoint / "text.txt"), "--device", "cpu", *QUICK]
    words += ["--recover-steps", "1", "--max-memory", "1KB", "--output", str(checkpoint / "out")]
    assert main(words) == 2
    message = "max_memory: expected a limit of at least twice the weights with recover_steps"
    assert message in capsys.readouterr().err and "out" not in os.listdir(checkpoint)
