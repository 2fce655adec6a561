"""Pruned layers on disk, one file each, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save

from hf_cod.decoder_layers import DecoderLayers
from hf_cod.files import write_aside


class FinishedLayers:
    """The layers that are done, with the names of the matrices that no token entered.

    A file holds the layer's matrices (out, in) as they are after pruning; what else a layer has does not change.

    Args:
        directory: where the files are, or None to keep nothing on disk.
        work: fingerprint of model, batches and settings: files of other work are not read.
        stack: the model's layers.
    """

    def __init__(self, directory: str | Path | None, work: str, stack: DecoderLayers) -> None:
        self._directory = None if directory is None else Path(directory)
        self._work = work
        self._stack = stack
        self.unseen: dict[int, list[str]] = {}

    def __contains__(self, index: int) -> bool:
        path = self._path(index)
        return index in self.unseen or (path is not None and path.is_file())

    @torch.no_grad()
    def restore(self, index: int) -> None:
        """Puts a finished layer's weights into the model."""
        path = self._path(index)
        if path is None or index in self.unseen:
            return
        with safe_open(path, "pt") as file:
            for name, W in self._stack.matrices(index):
                W.copy_(file.get_tensor(name))
            self.unseen[index] = json.loads(file.metadata()["unseen"])

    def add(self, index: int, unseen: list[str]) -> None:
        """Records that a layer is done; it is on disk when this returns."""
        self.unseen[index] = unseen
        path = self._path(index)
        if path is not None:
            tensors = {name: W.contiguous() for name, W in self._stack.matrices(index)}
            write_aside(path, lambda file: file.write(save(tensors, {"unseen": json.dumps(unseen)})))

    def _path(self, index: int) -> Path | None:
        return None if self._directory is None else self._directory / f"{self._work}-{index:05d}.safetensors"
