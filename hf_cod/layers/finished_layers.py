"""Layers that are done, on disk, one file each, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from hf_cod.io.files import fingerprint, write_aside
from hf_cod.io.text import Batch
from hf_cod.layers.fingerprints import Journals


class FinishedLayers:
    """The layers that are done, with what is to be said of each.

    Args:
        directory: where the files are, or None to keep nothing on disk.
        work: fingerprint of model, batches and settings: files of other work are not read.
        tensors_of: layer -> what its file holds, once it is done.
        put_back: (layer, those tensors) puts them into the intact model.
    """

    def __init__(
        self,
        directory: str | Path | None,
        work: str,
        tensors_of: Callable[[int], dict[str, Tensor]],
        put_back: Callable[[int, dict[str, Tensor]], None],
    ) -> None:
        self._directory = None if directory is None else Path(directory)
        self._work = work
        self._tensors_of, self._put_back = tensors_of, put_back
        self.notes: dict[int, Any] = {}

    def __contains__(self, index: int) -> bool:
        path = self._path(index)
        return index in self.notes or (path is not None and path.is_file())

    @torch.no_grad()
    def restore(self, index: int) -> None:
        """Puts a finished layer into the model."""
        path = self._path(index)
        if path is None or index in self.notes:
            return
        with safe_open(path, "pt") as file:
            self._put_back(index, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - not a dict
            self.notes[index] = json.loads(file.metadata()["note"])

    def add(self, index: int, note: Any) -> None:
        """Records that a layer is done, with a JSON-like note; it is on disk when this returns."""
        self.notes[index] = note
        path = self._path(index)
        if path is not None:
            tensors = {name: tensor.contiguous() for name, tensor in self._tensors_of(index).items()}
            write_aside(path, lambda file: file.write(save(tensors, {"note": json.dumps(note)})))

    def _path(self, index: int) -> Path | None:
        return None if self._directory is None else self._directory / f"{self._work}-{index:05d}.safetensors"


def fingerprint_of_work(
    directory: str | Path | None, model: nn.Module, batches: Sequence[Batch] | None, *settings: Any
) -> str:
    """What `FinishedLayers` tells this work from other work by; "" without a directory, where nothing is kept."""
    return "" if directory is None else fingerprint(Journals(directory, model, batches or []).inputs, *settings)
