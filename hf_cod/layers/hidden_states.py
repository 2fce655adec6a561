"""The hidden states of all batches between two layers: in memory, or in files for a model whose weights stay there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file

from hf_cod.io.offloaded import offloaded_weights
from hf_cod.io.reading import open_tensors
from hf_cod.layers.finished_layers import FinishedLayers
from hf_cod.layers.partial_forward import State
from hf_cod.layers.stack import DecoderLayers

_KEY = "hidden"


class HiddenStates:
    """The state of each batch before the next layer, None before the first one.

    Args:
        count: number of batches.
        directory: where hidden states are; None: in memory, on the CPU.
    """

    def __init__(self, count: int, directory: Path | None) -> None:
        self._states: list[State | None] = [None] * count
        self._directory = directory

    def __getitem__(self, number: int) -> State | None:
        state = self._states[number]
        if state is None or self._directory is None:
            return state
        # Copied into memory of torch's own: in a mapped file's, products round by how its tensors are aligned.
        with open_tensors(self._path(number), "journal", "hidden states") as file:
            return file.get_tensor(_KEY).clone(), state[1]

    def __setitem__(self, number: int, state: State) -> None:
        hidden, rest = state
        if self._directory is not None:
            # Neither renamed nor fsynced: an interrupted run computes them again.
            save_file({_KEY: hidden.contiguous()}, self._path(number))
            hidden = hidden[:0].clone()
        self._states[number] = (hidden.cpu(), rest)

    def _path(self, number: int) -> Path:
        assert self._directory is not None
        return self._directory / f"{number:05d}.safetensors"


@contextmanager
def hidden_states(stack: DecoderLayers, count: int, finished: FinishedLayers) -> Iterator[HiddenStates]:
    """The states of `count` batches, beside the finished layers if the weights stay in files; removed at the end."""
    if offloaded_weights(stack.model) is None:
        yield HiddenStates(count, None)
        return
    directory = finished.scratch()
    shutil.rmtree(directory, ignore_errors=True)  # of a killed run
    directory.mkdir(parents=True)
    try:
        yield HiddenStates(count, directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
