"""Outputs of a saved model that a process of its own has loaded, with the package imported and nothing else done.

Such processes are forked from a server that has imported modules and done nothing else. Where the system cannot fork,
each of them starts from nothing.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_CAN_FORK = "forkserver" in multiprocessing.get_all_start_methods()
_CONTEXT: Any = multiprocessing.get_context("forkserver" if _CAN_FORK else "spawn")
SECONDS = 300
_IMPORTS = [
    "torch",
    "transformers.trainer",
    "transformers.quantizers.auto",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "bitsandbytes",
    "hf_cod.compression.quantization.quantizer",
    "hf_cod.models.shapes",
]


class ReloadError(Exception):
    """What was raised in the other process: its class, its place and its text."""


def preload() -> None:
    """Has the server import what every process requires; without effect once it has started."""
    if _CAN_FORK:
        _CONTEXT.set_forkserver_preload(_IMPORTS)


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
        process = _CONTEXT.Process(target=_read, args=(folder, auto_class.__name__, outputs), daemon=True)
        process.start()
        process.join(SECONDS)
        if process.is_alive():
            process.kill()
            process.join()
            raise ReloadError(f"no result in {SECONDS} s")
        if (place / "error").exists():
            raise ReloadError((place / "error").read_text())
        if not (place / "outputs.pt").exists():
            raise ReloadError(f"the process ended with {process.exitcode}")
        return torch.load(place / "outputs.pt")


def _read(folder: str, auto_class: str, outputs: Callable[[Any, dict[str, Tensor]], Tensor]) -> None:
    """The work of the other process."""
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
