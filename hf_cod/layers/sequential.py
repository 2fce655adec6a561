"""Changes or measures a model layer by layer; each layer gets the outputs of the changed layers before it.

Where layers cannot be run one after another by themselves (they share keys and values, get states of several others, or
run several times), the whole model runs for each layer. A layer that runs several times has the inputs of all its runs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from hf_cod.io.text import Batch
from hf_cod.layers.devices import execution_device, to_device
from hf_cod.layers.finished_layers import FinishedLayers
from hf_cod.layers.hidden_states import HiddenStates, hidden_states
from hf_cod.layers.independence import dependence
from hf_cod.layers.modes import one_thread
from hf_cod.layers.offloading import changed_in_memory
from hf_cod.layers.partial_forward import State, run_layer
from hf_cod.layers.running import evaluation_mode, progress
from hf_cod.layers.stack import DecoderLayers
from hf_cod.layers.task import model_inputs

logger = logging.getLogger(__name__)


class Sums(Protocol):
    """Sums over the inputs of each matrix."""

    def of(self, name: str, expert: int | None = None) -> Tensor | None:
        """The sum of a matrix or of one of its experts; None if it received no tokens."""


class Recorder(Sums, Protocol):
    """Computes such sums while the model runs: `start` before and `finish` after each pass, within `attached`."""

    def attached(self) -> AbstractContextManager[None]:
        """Adds hooks to the modules, and removes them at the end of the block."""

    def start(self, inputs: Mapping[str, Any]) -> None:
        """Starts a batch with the inputs of the model, whose masks say which tokens are padding."""

    def finish(self, number: int) -> None:
        """Ends a batch."""


ChangeLayer = Callable[[int, Sums], Any]
"""(layer, sums of its matrices) -> a JSON-like note for the report."""


@torch.no_grad()
def change_sequentially(
    stack: DecoderLayers,
    batches: Sequence[Batch],
    make_recorder: Callable[[DecoderLayers, Sequence[int]], Recorder],
    change_layer: ChangeLayer,
    finished: FinishedLayers,
    title: str,
    show_progress: bool,
) -> list[str]:
    """Changes all layers in order. Each runs twice on all batches: for its sums, and, once changed, for the next layer.

    In addition to the model, memory holds the hidden state of each batch on the CPU, and the sums and activations of
    one layer; for a model whose weights stay in files, hidden states are in files, too. Finished layers are only run.
    Where the whole model runs for each layer, that takes a forward pass for each, and no hidden states are held.

    Returns:
        A sentence for a report if the whole model runs for each layer, else none.
    """
    why = dependence(stack, batches)
    with evaluation_mode(stack):
        if why is None:
            _change_one_after_another(stack, batches, make_recorder, change_layer, finished, title, show_progress)
        else:
            _warn(stack, why)
            for index, sums in _whole_passes(stack, batches, make_recorder, finished, title, show_progress):
                with changed_in_memory(stack, index, finished):
                    finished.add(index, change_layer(index, sums))
    return [] if why is None else [f"the whole model was run for each layer: {why}"]


def _change_one_after_another(
    stack: DecoderLayers,
    batches: Sequence[Batch],
    make_recorder: Callable[[DecoderLayers, Sequence[int]], Recorder],
    change_layer: ChangeLayer,
    finished: FinishedLayers,
    title: str,
    show_progress: bool,
) -> None:
    last = _last_unfinished(stack, finished)
    with hidden_states(stack, len(batches), finished) as before:
        for index in progress(range(len(stack)), title, show_progress):
            with changed_in_memory(stack, index, finished):
                if index in finished:
                    finished.restore(index)
                else:
                    sums = make_recorder(stack, [index])
                    for _ in _run(stack, index, batches, before, sums):
                        pass
                    finished.add(index, change_layer(index, sums))
                    del sums
                if index < last:
                    for number, state in _run(stack, index, batches, before):
                        before[number] = state


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
    """Measures all layers in order without changing the model. Each runs once on all batches, for its sums and for the
    next layer. Memory and whole passes as in `change_sequentially`; finished layers are only run.
    """
    why = dependence(stack, batches)
    last = _last_unfinished(stack, finished)
    with evaluation_mode(stack), hidden_states(stack, len(batches), finished) as before:
        if why is not None:
            _warn(stack, why)
            for index, sums in _whole_passes(stack, batches, make_recorder, finished, title, show_progress):
                finished.add(index, measure_layer(index, sums))
            return
        for index in progress(range(len(stack)), title, show_progress):
            found = None if index in finished else make_recorder(stack, [index])
            if index <= last:
                for number, state in _run(stack, index, batches, before, found):
                    before[number] = state
            if found is None:
                finished.restore(index)
            else:
                finished.add(index, measure_layer(index, found))


def change_each(
    stack: DecoderLayers,
    change_layer: Callable[[int, Sums | None], Any],
    finished: FinishedLayers,
    title: str,
    show_progress: bool,
    sums: Sums | None = None,
) -> None:
    """Changes all layers in order without running them, from their weights alone or with `sums` of the intact model."""
    with one_thread(stack.model):
        for index in progress(range(len(stack)), title, show_progress):
            with changed_in_memory(stack, index, finished):
                if index in finished:
                    finished.restore(index)
                else:
                    finished.add(index, change_layer(index, sums))


def _whole_passes(
    stack: DecoderLayers,
    batches: Sequence[Batch],
    make_recorder: Callable[[DecoderLayers, Sequence[int]], Recorder],
    finished: FinishedLayers,
    title: str,
    show_progress: bool,
) -> Iterator[tuple[int, Recorder]]:
    """Yields each unfinished layer and its sums, from a forward pass of the model as the layers before have left it."""
    device = execution_device(stack.model)
    for index in progress(range(len(stack)), title, show_progress):
        if index in finished:
            with changed_in_memory(stack, index, finished):
                finished.restore(index)
            continue
        sums = make_recorder(stack, [index])
        with sums.attached():
            for number, batch in enumerate(batches):
                inputs = model_inputs(stack.model, to_device(batch, device))
                sums.start(inputs)
                stack.trunk(**inputs)
                sums.finish(number)
        yield index, sums


def _warn(stack: DecoderLayers, why: str) -> None:
    logger.warning("%s is run as a whole for each layer, which takes longer: %s", type(stack.model).__name__, why)


def _last_unfinished(stack: DecoderLayers, finished: FinishedLayers) -> int:
    """Index of the last unfinished layer, -1 if there is none. Later layers need not run."""
    return max((index for index in range(len(stack)) if index not in finished), default=-1)


def _run(
    stack: DecoderLayers,
    index: int,
    batches: Sequence[Batch],
    before: HiddenStates,
    recorder: Recorder | None = None,
) -> Iterator[tuple[int, State]]:
    """Runs one layer on each batch, with a recorder if given; yields numbers of batches and states."""
    device = execution_device(stack.model)
    with nullcontext() if recorder is None else recorder.attached():
        for number, batch in enumerate(batches):
            inputs = model_inputs(stack.model, to_device(batch, device))
            if recorder is not None:
                recorder.start(inputs)
            state = run_layer(stack, index, inputs, before[number])
            if recorder is not None:
                recorder.finish(number)
            yield number, state
