"""Layer by layer: what the changed layers before it hand on is what a layer is changed on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from hf_cod.io.text import Batch
from hf_cod.layers.devices import execution_device, to_device
from hf_cod.layers.finished_layers import FinishedLayers
from hf_cod.layers.modes import one_thread
from hf_cod.layers.partial_forward import State, run_layer
from hf_cod.layers.running import evaluation_mode, progress
from hf_cod.layers.stack import DecoderLayers
from hf_cod.layers.task import model_inputs


class Sums(Protocol):
    """Sums over what entered each matrix."""

    def of(self, name: str, expert: int | None = None) -> Tensor | None:
        """The sum of a matrix or of one of its experts; None if no token entered it."""


class Recorder(Sums, Protocol):
    """Makes such sums while the model runs: `start` before and `finish` after each pass, within `attached`."""

    def attached(self) -> AbstractContextManager[None]:
        """Puts hooks on the modules, and takes them away at the end of the block."""

    def start(self, mask: Tensor | None) -> None:
        """Begins a batch with its attention mask (S, T), or None."""

    def finish(self, number: int) -> None:
        """Ends a batch."""


ChangeLayer = Callable[[int, Sums], Any]
"""(layer, sums of its matrices) -> a JSON-like note of what is to be said of it."""


@torch.no_grad()
def change_sequentially(
    stack: DecoderLayers,
    batches: Sequence[Batch],
    make_recorder: Callable[[DecoderLayers, Sequence[int]], Recorder],
    change_layer: ChangeLayer,
    finished: FinishedLayers,
    title: str,
    show_progress: bool,
) -> None:
    """Changes layer after layer; each runs twice on all batches: once for its sums, once changed, for the next layer.

    Beside the model, memory holds the hidden state of each batch on the CPU, and one layer's sums and activations.
    Finished layers are only run.
    """
    last = _last_unfinished(stack, finished)
    before: list[State | None] = [None] * len(batches)
    with evaluation_mode(stack):
        for index in progress(range(len(stack)), title, show_progress):
            if index in finished:
                finished.restore(index)
            else:
                sums = make_recorder(stack, [index])
                for _ in _run(stack, index, batches, before, sums):
                    pass
                finished.add(index, change_layer(index, sums))
                del sums
            if index < last:
                for number, (hidden, rest) in _run(stack, index, batches, before):
                    before[number] = (hidden.cpu(), rest)


@torch.no_grad()
def measure_sequentially(
    stack: DecoderLayers,
    batches: Sequence[Batch],
    make_recorder: Callable[[DecoderLayers, Sequence[int]], Recorder],
    measure_layer: ChangeLayer,
    finished: FinishedLayers,
    title: str,
    show_progress: bool,
) -> None:
    """Measures layer after layer of a model that stays as it is: each runs once on all batches, for its sums and for
    the next layer. Memory as in `change_sequentially`; finished layers are only run.
    """
    last = _last_unfinished(stack, finished)
    before: list[State | None] = [None] * len(batches)
    with evaluation_mode(stack):
        for index in progress(range(len(stack)), title, show_progress):
            sums = None if index in finished else make_recorder(stack, [index])
            if index <= last:
                for number, (hidden, rest) in _run(stack, index, batches, before, sums):
                    before[number] = (hidden.cpu(), rest)
            if sums is None:
                finished.restore(index)
            else:
                finished.add(index, measure_layer(index, sums))


def change_each(
    stack: DecoderLayers,
    change_layer: Callable[[int, Sums | None], Any],
    finished: FinishedLayers,
    title: str,
    show_progress: bool,
    sums: Sums | None = None,
) -> None:
    """Changes layer after layer without running any: by its weights alone, or by `sums` of the intact model."""
    with one_thread(stack.model):
        for index in progress(range(len(stack)), title, show_progress):
            if index in finished:
                finished.restore(index)
            else:
                finished.add(index, change_layer(index, sums))


def _last_unfinished(stack: DecoderLayers, finished: FinishedLayers) -> int:
    """Behind it no layer needs to run."""
    return max((index for index in range(len(stack)) if index not in finished), default=-1)


def _run(
    stack: DecoderLayers,
    index: int,
    batches: Sequence[Batch],
    before: Sequence[State | None],
    recorder: Recorder | None = None,
) -> Iterator[tuple[int, State]]:
    """Runs one layer on each batch, watched by a recorder if there is one; gives numbers of batches and states."""
    device = execution_device(stack.model)
    with nullcontext() if recorder is None else recorder.attached():
        for number, batch in enumerate(batches):
            inputs = model_inputs(to_device(batch, device))
            if recorder is not None:
                recorder.start(inputs.get("attention_mask"))
            state = run_layer(stack, index, inputs, before[number])
            if recorder is not None:
                recorder.finish(number)
            yield number, state
