"""Signs of life of long work."""

import io
import sys

import pytest

from hf_cod.layers.running import busy


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
