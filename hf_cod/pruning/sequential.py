"""Layer by layer: what the pruned layers before it hand on is what a layer is pruned on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from hf_cod.calibration import Batch
from hf_cod.decoder_layers import DecoderLayers
from hf_cod.diagnostics.partial_pass import State, run_layer
from hf_cod.diagnostics.running import evaluation_mode, execution_device, progress, to_device
from hf_cod.evaluation import model_inputs
from hf_cod.pruning.finished_layers import FinishedLayers
from hf_cod.pruning.method import Recorder, Sums

PruneLayer = Callable[[int, "Sums | None"], "list[str]"]
"""(layer, sums of its matrices) -> what `weights.prune_layer` returns."""


@torch.no_grad()
def prune_sequentially(
    stack: DecoderLayers,
    batches: Sequence[Batch],
    make_recorder: Callable[[DecoderLayers, Sequence[int]], Recorder],
    prune_layer: PruneLayer,
    finished: FinishedLayers,
    show_progress: bool,
) -> None:
    """Prunes layer after layer; each runs twice on all batches: once for its sums, once pruned, for the next layer.

    Beside the model, memory holds the hidden state of each batch on the CPU, and one layer's sums and activations.
    Finished layers are only run.
    """
    device = execution_device(stack.model)
    last = max((index for index in range(len(stack)) if index not in finished), default=-1)
    before: list[State | None] = [None] * len(batches)
    with evaluation_mode(stack):
        for index in progress(range(len(stack)), "pruning", show_progress):
            if index in finished:
                finished.restore(index)
            else:
                sums = _record(stack, index, batches, before, make_recorder, device)
                finished.add(index, prune_layer(index, sums))
                del sums
            if index < last:
                for number, batch in enumerate(batches):
                    inputs = model_inputs(to_device(batch, device))
                    hidden, rest = run_layer(stack, index, inputs, before[number])
                    before[number] = (hidden.cpu(), rest)


def _record(
    stack: DecoderLayers,
    index: int,
    batches: Sequence[Batch],
    before: Sequence[State | None],
    make_recorder: Callable[[DecoderLayers, Sequence[int]], Recorder],
    device: torch.device,
) -> Sums:
    recorder = make_recorder(stack, [index])
    with recorder.attached():
        for number, batch in enumerate(batches):
            inputs = model_inputs(to_device(batch, device))
            recorder.start(inputs.get("attention_mask"))
            run_layer(stack, index, inputs, before[number])
            recorder.finish(number)
    return recorder
