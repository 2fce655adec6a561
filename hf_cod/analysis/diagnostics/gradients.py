"""Gradient norm of each layer's parameters, with the memory of one gradient at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_cod.analysis.diagnostics.forward_pass import ForwardRecorder
from hf_cod.analysis.evaluation.likelihood import negative_log_likelihood
from hf_cod.io.deprecation import renamed
from hf_cod.io.text import IGNORED_LABEL, Batch
from hf_cod.layers.checks import name_of
from hf_cod.layers.devices import execution_device, random_state_restored, to_device
from hf_cod.layers.inputs import check_inputs
from hf_cod.layers.modes import gradients_restored
from hf_cod.layers.running import evaluation_mode, progress
from hf_cod.layers.stack import DecoderLayers, find_decoder_layers
from hf_cod.layers.task import LANGUAGE_MODELS, model_inputs, targets, task_of

Read = Callable[[Tensor], None]
"""Reads a parameter of a layer whose `grad` has just been computed."""


@renamed(path="layers_path")
def measure_gradient_norm(
    model: nn.Module, batches: Sequence[Batch], *, layers_path: str | None = None, show_progress: bool = False
) -> list[float]:
    """Norm of the gradient of the loss with respect to each layer's parameters, mean over batches.

        g_l = 1/B sum_b || d L_b / d theta_l ||_2 = 1/B sum_b sqrt( sum_i (d L_b / d theta_{l,i})^2 )

    arXiv 2502.05795, gradient norm of a layer. L_b is the mean loss over batch b's predicted tokens (next tokens,
    masked tokens), or the model's own loss if the batch has labels for another head. Squares are summed in float32 or
    wider, and each gradient is freed as soon as its squares are summed; requires_grad and existing gradients are
    restored.

    Returns:
        One norm per layer.

    Raises:
        ValueError: a model without a head or batches without labels (no loss), weights that are offloaded or quantized,
            gradients that are not finite or not recorded (Reformer).
    """
    stack = find_decoder_layers(model, layers_path)
    norms = list(gradient_norms(stack, batches, "gradient_norm", show_progress))
    return torch.stack(norms).mean(0).tolist()


def gradient_norms(
    stack: DecoderLayers, batches: Sequence[Batch], field: str, show_progress: bool, read: Read | None = None
) -> Iterator[Tensor]:
    """Runs forward and backward on each batch with predictions; yields the norms (L,) of its gradients.

    Args:
        stack: the layers.
        batches: dicts for the model's forward.
        field: the user's setting, with which errors begin.
        show_progress: show a progress bar.
        read: called with each gradient of the layers before it is freed.

    Raises:
        ValueError: as `measure_gradient_norm` does.
    """
    task = task_of(stack.model, batches)
    reason = why_no_gradients(stack, task, batches)
    if reason:
        raise ValueError(f"{field}: expected a loss and floating-point weights in memory, got none: {reason}")
    check_inputs(stack.model, batches)
    device = execution_device(stack.model)
    measured = False
    with torch.inference_mode(False), evaluation_mode(stack), _layer_squares(stack, read) as squares:
        for number, batch in enumerate(progress(batches, "gradients", show_progress)):
            for square in squares:
                square.zero_()
            batch = to_device(batch, device)
            if not count_predictions(batch, task):
                continue  # for example, a sample of one token has no prediction
            measured = True
            with torch.enable_grad():
                loss = mean_loss(stack.model, batch, task)
                check_recorded(stack, loss, field)
                loss.backward()
            norms = torch.stack([square.sqrt().cpu() for square in squares]).double()
            if not norms.isfinite().all():
                _check_activations(stack, batch, number)
                layer = int((~norms.isfinite()).nonzero()[-1])  # the first one in the backward pass
                raise ValueError(
                    f"gradients: expected finite numbers, got NaN or infinity in layer {layer}, batch {number}"
                )
            yield norms
    if not measured:
        raise ValueError("batches: expected at least one token to predict, got none; give longer samples")


class NotRecordedError(ValueError):
    """A loss has no gradients, because the model runs its layers without recording."""


def check_recorded(stack: DecoderLayers, loss: Tensor, field: str) -> None:
    """Checks that a loss has gradients; that of a reversible model (Reformer) has none where only its layers need them.

    Raises:
        NotRecordedError: it has none.
    """
    if not loss.requires_grad:
        raise NotRecordedError(
            f"{field}: expected layers whose gradients are recorded, got those of {name_of(stack)}, which runs them "
            "without recording"
        )


def _check_activations(stack: DecoderLayers, batch: Batch, number: int) -> None:
    """Names the layer in which activations are not finite first, if there is one."""
    recorder = ForwardRecorder(stack, [], "last")
    with torch.no_grad(), recorder.attached():
        recorder.start(None, len(next(iter(batch.values()))))
        stack.model(**model_inputs(stack.model, batch))
        recorder.finish(number)


def read_gradient_norms(stack: DecoderLayers) -> list[float | None]:
    """Norm of the current gradients of each layer's parameters.

        g_l = || d L / d theta_l ||_2 over the layer's parameters that have a gradient

    Norms are computed in float32 for all dtypes of gradients, without a copy. Sharded gradients (FSDP2) are reduced
    over their mesh, so all of its processes must call this together.

    Returns:
        One norm per layer; None if no parameter of the layer has a gradient (frozen, or no backward pass yet).
    """
    seen: set[int] = set()  # a layer that is in the stack twice counts at its first position
    norms: list[Tensor | None] = []
    for layer in stack:
        grads = [p.grad for p in layer.parameters() if p.grad is not None and id(p) not in seen]
        seen.update(id(p) for p in layer.parameters())
        norms.append(_norm([g.detach() for g in grads]) if grads else None)
    return [None if norm is None else float(norm) for norm in norms]


def _norm(grads: list[Tensor]) -> Tensor:
    parts = [torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32)) for g in grads]
    norm = torch.linalg.vector_norm(torch.stack([part.to(parts[0].device) for part in parts]))
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def why_no_gradients(stack: DecoderLayers, task: str, batches: Sequence[Batch]) -> str | None:
    """The reason why gradients of a model on these batches cannot be measured; None if they can."""
    name = type(stack.model).__name__
    if task == "headless":
        return f"{name} has no head"
    if task == "unlabelled" and not _returns_loss(stack, batches):
        return f"{name} requires labels, or other inputs of which it makes a loss, and the batches have none"
    if any(p.device.type == "meta" for p in stack.model.parameters()):
        return "weights are offloaded"
    # bitsandbytes' codes may be stored as floating point.
    if any(not p.is_floating_point() or hasattr(p, "quant_state") for layer in stack for p in layer.parameters()):
        return "weights are quantized"
    return None


@torch.no_grad()
def _returns_loss(stack: DecoderLayers, batches: Sequence[Batch]) -> bool:
    """Whether a model returns a loss without labels, of what it hides itself or of other targets (`future_values`)."""
    # Whatever a model raises on a batch that is none for it.
    with suppress(Exception), evaluation_mode(stack), random_state_restored(stack.model):
        device = execution_device(stack.model)
        found = (getattr(stack.model(**to_device(batch, device)), "loss", None) for batch in batches)
        return all(isinstance(loss, Tensor) for loss in found)
    return False


def mean_loss(model: nn.Module, batch: Batch, task: str) -> Tensor:
    """The loss of a batch, mean over its predictions; the same at each call if the model hides parts at random."""
    if task not in LANGUAGE_MODELS:
        with random_state_restored(model, seed=0):
            return model(**batch).loss
    logits = model(**model_inputs(model, batch)).logits
    labels = targets(batch, task).to(logits.device)
    return negative_log_likelihood(logits, labels).sum() / (labels != IGNORED_LABEL).sum()


def count_predictions(batch: Batch, task: str) -> int:
    """Number of predicted tokens of a language model; number of samples for other heads."""
    if task not in LANGUAGE_MODELS:
        return len(next(iter(batch.values())))
    return int((targets(batch, task) != IGNORED_LABEL).sum())


@contextmanager
def _layer_squares(stack: DecoderLayers, read: Read | None) -> Iterator[list[Tensor]]:
    """Sums of squared gradients per layer, filled by each backward pass; gradients are freed immediately."""
    before = [(p, p.grad) for p in stack.model.parameters()]
    squares: list[Tensor] = []
    handles = []

    def count_into(square: Tensor) -> Any:
        def count(p: Tensor) -> None:
            if p.grad is None:  # a layer that is in the stack twice counts at its first position
                return
            square.add_(p.grad.to(square.dtype).square().sum().to(square.device))
            if read is not None:
                read(p)
            p.grad = None

        return count

    with gradients_restored([p for p, _ in before]):
        try:
            for p, _ in before:
                p.requires_grad_(False)
                p.grad = None
            for layer in stack:
                parameters = [p for p in layer.parameters() if p.is_floating_point()]
                high = torch.promote_types(parameters[0].dtype, torch.float32) if parameters else torch.float32
                square = torch.zeros((), dtype=high, device=parameters[0].device if parameters else None)
                squares.append(square)
                for p in parameters:
                    p.requires_grad_(True)
                    handles.append(p.register_post_accumulate_grad_hook(count_into(square)))
            yield squares
        finally:
            for handle in handles:
                handle.remove()
            for p, grad in before:
                p.grad = grad
