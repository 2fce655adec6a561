"""Processes that know nothing of this one: a stranger without the package, one that is killed, two that train together.

They are forked from a server that has imported torch and transformers and nothing of ours, since a process that starts
from nothing imports for seconds. Where the system cannot fork, each of them starts from nothing.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from subprocess import CompletedProcess

_CAN_FORK = "forkserver" in multiprocessing.get_all_start_methods()
_CONTEXT = multiprocessing.get_context("forkserver" if _CAN_FORK else "spawn")
_MODELS = ("auto.modeling_auto", "auto.tokenization_auto", "llama.modeling_llama")


def preload(*modules: str) -> None:
    """Has the server import more modules; without effect once it has started."""
    if _CAN_FORK:
        models = [f"transformers.models.{name}" for name in _MODELS]
        _CONTEXT.set_forkserver_preload(["torch", *models, "transformers.trainer", *modules])


preload()


class FreshProcess:
    """A process that runs Python code, as `python -c code *arguments` does.

    Args:
        code: what it runs as its main module.
        arguments: its `sys.argv`, behind the first.
        cwd: its working directory.
        paths: directories in which it looks for modules first.
        environment: variables beside those of this process.
    """

    def __init__(
        self,
        code: str,
        *arguments: object,
        cwd: str | Path | None = None,
        paths: Sequence[str | Path] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        job = {
            "code": code,
            "argv": ["-c", *map(str, arguments)],
            "cwd": str(cwd or Path.cwd()),
            "paths": [str(path) for path in paths],
            "environment": {**os.environ, **(environment or {})},
            "folder": self._folder.name,
        }
        self._process = _CONTEXT.Process(target=_run, args=(job,))
        self._process.start()

    def ended(self, seconds: float = 0) -> bool:
        """Whether it has ended, or ends within so many seconds."""
        self._process.join(seconds)
        return self._process.exitcode is not None

    def send(self, signal: int) -> None:
        """Sends a signal to it, unless it has ended."""
        if not self.ended():
            os.kill(self._process.pid, signal)

    def wait(self, timeout: float = 1200) -> CompletedProcess:
        """What it printed and its exit status, when it has ended."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
        texts = [(Path(self._folder.name) / name).read_text(errors="replace") for name in ("stdout", "stderr")]
        self._folder.cleanup()
        return CompletedProcess(self._process.name, self._process.exitcode, *texts)


def run_fresh(code: str, *arguments: object, **options) -> CompletedProcess:
    """Runs a `FreshProcess` to its end."""
    return FreshProcess(code, *arguments, **options).wait()


def _run(job: dict) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        descriptor = os.open(Path(job["folder"]) / name, os.O_WRONLY | os.O_CREAT)
        os.dup2(descriptor, number)
    os.environ.clear()
    os.environ.update(job["environment"])
    os.chdir(job["cwd"])
    sys.argv, sys.path[:0] = job["argv"], job["paths"]
    _read_environment_again()
    assert "hf_cod" not in sys.modules
    exec(compile(job["code"], "<string>", "exec"), {"__name__": "__main__"})


def _read_environment_again() -> None:
    """What the server's imports took from the environment once and for all."""
    import torch
    from huggingface_hub import constants
    from huggingface_hub.utils import _cache_assets
    from transformers import dynamic_module_utils

    if "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if "HF_ASSETS_CACHE" in os.environ:
        _cache_assets.HF_ASSETS_CACHE = os.environ["HF_ASSETS_CACHE"]
    if "HF_HUB_DISABLE_PROGRESS_BARS" in os.environ:
        disabled = constants._is_true(os.environ["HF_HUB_DISABLE_PROGRESS_BARS"])
        sys.modules["huggingface_hub.utils.tqdm"].HF_HUB_DISABLE_PROGRESS_BARS = disabled
    if "HF_MODULES_CACHE" in os.environ:
        dynamic_module_utils.HF_MODULES_CACHE = os.environ["HF_MODULES_CACHE"]
