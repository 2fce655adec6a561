"""The outputs that a metric reads: those of the model, or of one tower of a model that has no output of its own."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch

from hf_cod.analysis.evaluation.metrics import Metric, has_main_output
from hf_cod.io.text import Batch
from hf_cod.layers.devices import execution_device, to_device
from hf_cod.layers.running import evaluation_mode
from hf_cod.layers.stack import DecoderLayers
from hf_cod.layers.task import model_inputs, task_of


@torch.no_grad()
def task_of_outputs(stack: DecoderLayers, batches: Sequence[Batch]) -> str:
    """As `task_of`, but "labels" in place of "classes" where the model returns no `logits` with one number for each
    class of each label: models with two heads (BertForPreTraining), or one logit for each of two classes (ELECTRA's
    detection of replaced tokens). It is found out on the first batch.
    """
    task = task_of(stack.model, batches)
    if task != "classes":
        return task
    shape = batches[0]["labels"].shape
    # Whatever a model raises on a batch that is none for it; the measurement raises it again, with its number.
    with suppress(Exception), evaluation_mode(stack):
        batch = to_device(model_inputs(stack.model, batches[0]), execution_device(stack.model))
        logits = getattr(stack.model(**batch), "logits", None)
        return task if logits is not None and logits.shape[:-1] == shape else "labels"
    return task


def run_for_metric(stack: DecoderLayers, metric: Metric, batch: Batch) -> tuple[Any, Batch]:
    """Runs the model on a batch.

    Two towers beside each other (CLIP) return similarities of all texts and images. A metric that compares outputs then
    reads the outputs of the tower that has these layers.

    Args:
        stack: the layers.
        metric: from `find_metric`.
        batch: on the model's device.

    Returns:
        The outputs for `metric.rows`, and the batch for it: that of a tower, or of sound, has the mask of its tokens.
    """
    inputs = model_inputs(stack.model, batch)
    if not metric.compares:
        return stack.model(**inputs), batch
    seen: list[Any] = []
    handle = stack.tower.register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        outputs = stack.model(**inputs)
    finally:
        handle.remove()
    mask = stack.mask(inputs)
    own = {} if mask is None else {"attention_mask": mask}
    if has_main_output(outputs) or not seen:
        return outputs, batch if stack.name is not None else {**batch, **own}
    return seen[-1], own
