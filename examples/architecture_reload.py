"""Outputs of a saved model that a process of its own has loaded, with the package imported and nothing else done.

Such processes are forked, some 100 ms each, from a server that has imported modules and done nothing else.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import tempfile
import traceback
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SECONDS = 300
_IMPORTS = (
    "transformers.generation.utils",
    "transformers.modeling_utils",
    "transformers.quantizers.auto",
    "transformers.models.llama.modeling_llama",
    "bitsandbytes",
    "hf_cod.compression.quantization.quantizer",
    "hf_cod.models.shapes",
)


class ReloadError(Exception):
    """What was raised in the other process: its class, its place and its text."""


def reloaded_outputs(
    model: Any, auto_class: Any, batch: dict[str, Tensor], outputs: Callable[[Any, dict[str, Tensor]], Tensor]
) -> Tensor:
    """Saves a model, has a new process load it, and returns what it outputs there.

    Args:
        model: the model.
        auto_class: the class of transformers that loads it.
        batch: its inputs.
        outputs: model, batch -> tensor; a function of a module.

    Raises:
        ReloadError: loading or running failed in the other process.
    """
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        model.save_pretrained(place / "model")
        torch.save(batch, place / "batch.pt")
        connection = _server()
        connection.send((_modeling_of(model), folder, auto_class.__name__, outputs))
        status = connection.recv()
        if (place / "error").exists():
            raise ReloadError((place / "error").read_text())
        if not (place / "outputs.pt").exists():
            raise ReloadError(f"the process ended with status {status} and no result, within {SECONDS} s")
        return torch.load(place / "outputs.pt")


def _modeling_of(model: Any) -> list[str]:
    """The modules of transformers that define the model."""
    found = {type(module).__module__ for module in model.modules()}
    return sorted(name for name in found if name.startswith("transformers.models."))


def stop_server() -> None:
    """Ends the server, which otherwise ends with this process; the next reload starts another."""
    if _server.cache_info().currsize:
        _server().close()
        _server.cache_clear()


@cache
def _server() -> Any:
    """The connection to the server."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there,), daemon=True)
    process.start()
    there.close()
    return here


def _serve(connection: Any) -> None:
    """Forks a process for each job, and answers with its exit status."""
    for name in _IMPORTS:
        importlib.import_module(name)
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    get_checkpoint_conversion_mapping("llama")  # compiles what every from_pretrained uses
    while True:
        try:
            modules, *job = connection.recv()
        except EOFError:
            return
        for name in modules:
            importlib.import_module(name)
        child = os.fork()
        if child == 0:
            signal.alarm(SECONDS)
            _load(*job)
            os._exit(0)
        connection.send(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def _load(folder: str, auto_class: str, outputs: Callable[[Any, dict[str, Tensor]], Tensor]) -> None:
    """The work of a new process; leaves its outputs or its error in the folder."""
    place = Path(folder)
    try:
        import transformers

        import hf_cod  # noqa: F401 - registers its formats

        warnings.filterwarnings("ignore")
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        torch.set_num_threads(1)
        model = getattr(transformers, auto_class).from_pretrained(place / "model").eval()
        torch.save(outputs(model, torch.load(place / "batch.pt")), place / "outputs.pt")
    except BaseException as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        (place / "error").write_text(f"{type(error).__name__} {Path(frame.filename).name}: {error}")
