"""python -m hf_cod."""

import runpy
import sys

import pytest


def test_the_package_runs_as_a_module(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["hf_cod", "fly"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("hf_cod", run_name="__main__")
    assert ended.value.code == 2 and "got 'fly'" in capsys.readouterr().err
