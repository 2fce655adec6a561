"""hf-cod env: versions and hardware."""

from importlib.metadata import version

import torch

from hf_cod import __version__
from hf_cod.cli.commands import env
from hf_cod.cli.main import main


def test_versions_are_those_that_run_and_what_is_missing_is_said(capsys, monkeypatch):
    monkeypatch.setattr(env, "PACKAGES", ("transformers", "a-package-that-nobody-has"))
    assert main(["env"]) == 0
    shown = dict(line.removeprefix("- ").split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert (shown["hf_cod"], shown["transformers"]) == (__version__, version("transformers"))
    assert shown["a-package-that-nobody-has"] == "not installed"
    assert f"{torch.get_num_threads()} threads" in shown["cpu"] and shown["memory"].endswith(" GB")
    assert (shown["gpu"] == "none") == (torch.cuda.device_count() == 0)
