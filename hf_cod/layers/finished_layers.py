"""Finished layers on disk, one file each, so that an interrupted run resumes."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_cod.io.files import fingerprint
from hf_cod.io.journal import JournalError
from hf_cod.io.offloaded import offloaded_weights
from hf_cod.io.reading import naming_file, open_tensors, parse_json
from hf_cod.io.tensors import is_whole, save_tensors
from hf_cod.io.text import Batch
from hf_cod.layers.fingerprints import Journals

logger = logging.getLogger(__name__)

_NOTE = "note"


class FinishedLayers:
    """The finished layers, with a note for each.

    A file with a wrong checksum, or of other work or another layer, is removed with a warning, and its layer counts as
    unfinished. Files of earlier versions have neither and are used unchecked.

    Args:
        directory: directory of the files, or None to keep nothing on disk.
        work: fingerprint of model, batches and settings; files with another fingerprint are not read.
        tensors_of: layer -> the tensors of its file, once it is finished.
        put_back: (layer, those tensors) puts them into the intact model.
        check_note: (layer, its note) raises ValueError for what cannot be the note of this layer.
    """

    def __init__(
        self,
        directory: str | Path | None,
        work: str,
        tensors_of: Callable[[int], dict[str, Tensor]],
        put_back: Callable[[int, dict[str, Tensor]], None],
        check_note: Callable[[int, Any], object],
    ) -> None:
        self._directory = None if directory is None else Path(directory)
        if self._directory is not None and self._directory.is_file():
            raise ValueError(f"journal: expected a directory, got the file {str(directory)!r}")
        self._work = work
        self._tensors_of, self._put_back, self._check_note = tensors_of, put_back, check_note
        self._whole: set[int] = set()  # files that were found and checked
        self.notes: dict[int, Any] = {}

    def __contains__(self, index: int) -> bool:
        return index in self.notes or index in self._whole or self._find(index)

    @torch.no_grad()
    def restore(self, index: int) -> None:
        """Puts a finished layer into the model.

        Raises:
            JournalError: the file holds something else than this layer.
        """
        path = self._path(index)
        if path is None or index in self.notes:
            return
        try:
            self._restore(index, path)
        except ValueError as error:
            raise JournalError(str(error)) from error

    def _restore(self, index: int, path: Path) -> None:
        with open_tensors(path, "journal", f"a finished layer {index} (delete it to restart that layer)") as file:
            note = (file.metadata() or {}).get(_NOTE, "")
            # Copied into memory of torch's own: in a mapped file's, products round by how its tensors are aligned.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a dict
        with naming_file(path):
            bad = next((n for n, t in tensors.items() if t.is_floating_point() and not bool(t.isfinite().all())), None)
            if bad is not None:
                raise ValueError(f"journal: expected finite numbers, got NaN or infinity in {bad}")
            noted = parse_json(note, "journal note", nan=True)
            self._check_note(index, noted)
            try:
                self._put_back(index, tensors)
            except (ValueError, KeyError, RuntimeError, IndexError, TypeError, AttributeError) as error:
                raise ValueError(f"journal: expected the tensors of layer {index}, got others: {error}") from error
            self._check_put(index, tensors)
        self.notes[index] = noted

    def _check_put(self, index: int, tensors: dict[str, Tensor]) -> None:
        """Checks that the layer now has tensors of the same names, dtypes and shapes."""
        now = self._tensors_of(index)
        for name in sorted(now.keys() | tensors.keys()):
            mine, theirs = (
                (each[name].dtype, tuple(each[name].shape)) if name in each else "nothing" for each in (now, tensors)
            )
            if mine != theirs:
                raise ValueError(f"journal: expected {mine} as {name} of layer {index}, got {theirs}")

    def add(self, index: int, note: Any) -> None:
        """Records a finished layer with a JSON-like note; it is on disk when this returns."""
        self.notes[index] = note
        path = self._path(index)
        if path is not None:
            save_tensors(
                path, self._tensors_of(index), {_NOTE: json.dumps(note), **self._identity(index)}, checked=True
            )

    def scratch(self) -> Path:
        """A directory beside the files, for what only the running process needs."""
        assert self._directory is not None  # as in `kept`
        return self._directory / f"{self._work}-scratch"

    def kept(self, index: int) -> tuple[Path, dict[str, Tensor]]:
        """The file of a finished layer that is in the model, and the tensors that it holds."""
        path = self._path(index)
        assert path is not None  # `fingerprint_of_work` requires a directory where this is used
        return path, self._tensors_of(index)

    def _find(self, index: int) -> bool:
        """Looks for the file of a layer; a damaged one is removed."""
        path = self._path(index)
        if path is None or not path.is_file():
            return False
        if not is_whole(path, {_NOTE}, self._identity(index)):
            logger.warning("%s is damaged: layer %d is computed again", path, index)
            path.unlink()
            return False
        self._whole.add(index)
        return True

    def _identity(self, index: int) -> dict[str, str]:
        """What the metadata of a layer's file says, so that a renamed file is not taken for another one."""
        return {"work": self._work, "layer": str(index)}

    def _path(self, index: int) -> Path | None:
        return None if self._directory is None else self._directory / f"{self._work}-{index:05d}.safetensors"


def fingerprint_of_work(
    directory: str | Path | None, model: nn.Module, batches: Sequence[Batch] | None, *settings: Any
) -> str:
    """The fingerprint by which `FinishedLayers` identifies this work; "" without a directory, where nothing is kept.

    Raises:
        ValueError: no directory for a model whose weights stay in files; those of its finished layers would have none.
    """
    if directory is None and offloaded_weights(model) is not None:
        raise ValueError("journal: expected a directory for a model whose weights stay in files, got none")
    return "" if directory is None else fingerprint(Journals(directory, model, batches or []).inputs, *settings)
