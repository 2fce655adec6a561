"""Signs of life of long work."""

import io
import sys

import pytest

from hf_cod.layers import running
from hf_cod.layers.running import busy, progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_work_that_takes_a_while_is_named_on_a_terminal(monkeypatch):
    """While it goes on, also where it fails; afterwards the line is empty."""
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    with busy("loading mine"):
        assert "loading mine" in screen.getvalue()
    with pytest.raises(KeyError), busy("loading yours"):
        raise KeyError
    assert "loading yours" in screen.getvalue()
    _, last, left = screen.getvalue().split("\r")[-3:]
    assert last.strip() == "" == left, "the line is wiped"


def test_nothing_is_shown_elsewhere(monkeypatch, capsys):
    with busy("loading mine"):
        pass
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    with busy("loading mine", show=False):
        pass
    assert capsys.readouterr() == ("", "") and screen.getvalue() == ""


def test_a_log_file_gets_a_line_of_progress_now_and_then(monkeypatch, capsys):
    monkeypatch.setattr(running, "INTERVAL", 0.0)
    assert list(progress(range(3), "pruning", True)) == [0, 1, 2]
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == "pruning: 3 of 3, about 00:00 left" and not any("\r" in line for line in lines)
    assert list(progress(range(3), "pruning", False)) == [0, 1, 2]
    monkeypatch.setattr(running, "INTERVAL", 1e9)
    assert list(progress(range(3), "pruning", True)) == [0, 1, 2]
    assert capsys.readouterr().err == "", "what is quick needs none"


def test_lines_of_progress_within_others_are_not_shown(monkeypatch, capsys):
    monkeypatch.setattr(running, "INTERVAL", 0.0)
    for _ in progress(range(2), "outer", True):
        assert list(progress(range(2), "inner", True)) == [0, 1]
    shown = capsys.readouterr().err
    assert "outer" in shown and "inner" not in shown
