"""The log of a training where no bar stands."""

import pytest
import torch

from hf_cod import OwLoreSettings
from hf_cod.training.runs import log_lines
from hf_cod.training.runs.log_lines import duration
from hf_cod.training.runs.methods import METHODS
from hf_cod.training.runs.trainer import train
from hf_cod.training.runs.training_settings import TrainingSettings
from tests.tiny_models import build


@pytest.mark.parametrize(
    "seconds, told",
    [(0.2, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (125, "2 min 5 s"), (3600, "1 h 0 min"), (9000, "2 h 30 min")],
)
def test_durations(seconds, told):
    assert duration(seconds) == told


def lines_of_a_training(directory, capsys):
    """What a training of five steps prints, which logs every second and the last; also its losses."""
    settings = TrainingSettings(
        method="full", steps=5, batch_size=2, sequence_length=8, log_every=2, learning_rate=1e-5
    )
    model, optimizer = METHODS["full"].setup(build("llama"), None, OwLoreSettings(), settings.rate, 1)
    windows = torch.arange(8 * 8).view(8, 8) % 64
    training = train(model, optimizer, windows, settings, 0, directory, lasting=False)
    shown = capsys.readouterr()
    assert "\r" not in shown.out + shown.err and "{" not in shown.out
    first, *lines = shown.out.splitlines()
    assert first == "training for 5 steps"
    return lines, training.curve


def test_each_record_is_a_line_of_its_own(tmp_path, capsys):
    """Step, loss and time left, of the last step too; no carriage return, and none of Trainer's dictionaries."""
    lines, curve = lines_of_a_training(tmp_path, capsys)
    assert [line.partition(":")[0] for line in lines] == [f"step {step} of 5" for step in (1, 2, 4, 5)]
    assert lines[0].endswith(" s left") and "loss" not in lines[0], "the time is told before the first record"
    for line, (_, loss) in zip(lines[1:], curve, strict=True):
        assert f": loss {loss:.4g}" in line and line.endswith(" s left")


def test_a_long_wait_for_a_record_has_lines_of_its_own(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(log_lines, "INTERVAL", 0.0)
    lines, _ = lines_of_a_training(tmp_path, capsys)
    assert [line.partition(":")[0] for line in lines] == [f"step {step} of 5" for step in (1, 2, 3, 4, 5)]
    assert ["loss" in line for line in lines] == [False, True, False, True, True]
