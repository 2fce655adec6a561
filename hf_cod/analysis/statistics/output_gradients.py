"""Sensitivity of the loss to errors in the outputs of each matrix, from gradients of these outputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_cod.analysis.diagnostics.gradients import check_recorded, count_predictions, mean_loss, why_no_gradients
from hf_cod.io.text import Batch
from hf_cod.layers.devices import execution_device, to_device
from hf_cod.layers.inputs import check_inputs
from hf_cod.layers.layer_calls import check_first_call
from hf_cod.layers.modes import gradients_restored
from hf_cod.layers.running import evaluation_mode, hidden_input, progress
from hf_cod.layers.stack import DecoderLayers
from hf_cod.layers.task import model_inputs, task_of


def measure_loss_weights(
    stack: DecoderLayers, batches: Sequence[Batch], *, show_progress: bool = False
) -> dict[str, float]:
    """Increase of the loss if the output of a matrix is lost: name -> nats per prediction, for the whole output.

        c = 1/2 . 1/T sum_t ||g_t||_2^2 / m . 1/n sum_t ||W x_t||_2^2,   g_t = d L / d (W x_t)

    over the n input tokens of W (m, .) and the T predictions; L is the sum of their losses. This is the second-order
    term of E L(y + e) - L(y) for errors e in random directions, with the Hessian replaced by the Fisher matrix (as in
    successors of Optimal Brain Surgeon, Singh and Alistarh 2020, arXiv 2004.14340). Errors with a share s of the
    output's energy cost s c. The linear term is left out, since errors of both signs are equally likely.

    The matrices of a bank of experts have the c of the bank: W x_t then is its output for a token, the sum over experts
    if transformers runs the bank. All of it is lost with the outputs of any of its matrices.

    A matrix is missing if its output has no gradient, because it only chooses tokens (the indexers of DeepSeek-V3.2),
    or if no output is its product: c would be 0, which says nothing about the cost. No gradients of weights are
    computed or changed; memory is that of a forward pass with its activations.

    Args:
        stack: the layers of a model with a loss and weights in memory.
        batches: dicts for the model's forward; with labels, unless the head is that of a language model.
        show_progress: show a progress bar.

    Raises:
        ValueError: no loss, weights that are quantized or offloaded, or gradients that are not finite, or a layer
            that runs several times in one forward pass, or all of whose matrices would be missing, or a model that does
            not record the gradients of its layers.
    """
    task = task_of(stack.model, batches)
    reason = why_no_gradients(stack, task, batches)
    if reason:
        raise ValueError(f"batches: expected a loss and floating-point weights in memory, got none: {reason}")
    check_inputs(stack.model, batches)
    device = execution_device(stack.model)
    predictions = 0
    with torch.inference_mode(False), evaluation_mode(stack), _OutputSums(stack).attached() as sums:
        for place, batch in enumerate(progress(batches, "gradients", show_progress)):
            batch = to_device(batch, device)
            number = count_predictions(batch, task)
            if number:
                predictions += number
                sums.start(stack.mask(model_inputs(stack.model, batch)))
                with torch.enable_grad():
                    loss = mean_loss(stack.model, batch, task) * number
                    if not sums.ran:
                        raise ValueError(stack.not_run(f"others as batch {place}"))
                    check_recorded(stack, loss, "batches")
                    loss.backward()
    if not predictions:
        raise ValueError("batches: expected at least one token to predict, got none; give longer samples")
    return sums.weights(predictions)


class _OutputSums:
    """Sums of squares of outputs and of their gradients, for each Linear and each bank of experts of the layers."""

    def __init__(self, stack: DecoderLayers) -> None:
        self._stack = stack
        self._modules = {name: m for index in range(len(stack)) for name, m in stack.linears(index).items()}
        self._matrices = {name: [name] for name in self._modules}
        for matrix in (matrix for index in range(len(stack)) for matrix in stack.expert_matrices(index)):
            self._modules[matrix.bank] = matrix.module
            self._matrices.setdefault(matrix.bank, []).append(matrix.name)
        self._found: dict[str, Tensor] = {}
        self._channels: dict[str, int] = {}
        self._without: set[str] = set()
        self.start(None)

    def start(self, mask: Tensor | None) -> None:
        """Starts a batch with the mask of its tokens."""
        self.mask = mask
        self._called: set[int] = set()

    @property
    def ran(self) -> bool:
        """Whether a layer was called in this batch."""
        return bool(self._called)

    @contextmanager
    def attached(self) -> Iterator[_OutputSums]:
        """Within the block gradients start at the layers' input, and no weight requires a gradient."""
        parameters = [*self._stack.model.parameters()]
        handles = [self._stack[0].register_forward_pre_hook(_begin, with_kwargs=True)]
        handles += [layer.register_forward_pre_hook(self._count(i)) for i, layer in enumerate(self._stack)]
        handles += [m.register_forward_hook(self._hook_of(name, m)) for name, m in self._modules.items()]
        try:
            with gradients_restored(parameters):
                for p in parameters:
                    p.requires_grad_(False)
                yield self
        finally:
            for handle in handles:
                handle.remove()

    def weights(self, predictions: int) -> dict[str, float]:
        """c of each matrix; 0 if it received no tokens; see `measure_loss_weights` for those that are missing."""
        for index in range(len(self._stack)):
            names = {*self._stack.linears(index), *(one.bank for one in self._stack.expert_matrices(index))}
            if names and names <= self._without:
                raise ValueError(
                    f"model: expected a matrix whose product has a gradient in layer {index}, got none: what "
                    f"{min(names)} returns is more than its product, or does not reach the loss"
                )
        found = dict.fromkeys((name for name in self._modules if name not in self._without), 0.0)
        for name in self._found.keys() & found.keys():
            outputs, gradients, tokens = self._found[name].tolist()
            found[name] = 0.5 * gradients / predictions / self._channels[name] * outputs / max(1.0, tokens)
            if not found[name] < float("inf"):
                raise ValueError(f"gradients: expected finite numbers, got NaN or infinity at the output of {name}")
        return {matrix: value for name, value in found.items() for matrix in self._matrices[name]}

    def _count(self, index: int) -> Any:
        return lambda *_: check_first_call(self._stack, index, self._called)

    def _hook_of(self, name: str, module: Any) -> Any:
        def read(_: nn.Module, args: Any, output: Any) -> None:
            output = _product(module, args, output)
            if output is None or not output.requires_grad:
                self._without.add(name)
                return
            bias = getattr(module, "bias", None)
            y = output.detach() if bias is None else output.detach() - bias.detach()
            real = self._real(y)
            total = self._found.setdefault(name, torch.zeros(3, dtype=torch.float64))
            self._channels[name] = y.shape[-1]
            total[0] += (_squares(y) * real).sum().cpu()
            total[2] += real.sum().cpu()

            def add(gradient: Tensor) -> None:  # a return value would replace the gradient
                total[1] += _squares(gradient).sum().cpu()

            output.register_hook(add)

        return read

    def _real(self, y: Tensor) -> Tensor:
        """1 for each token, 0 for padding. Tokens routed to an expert have no position in the batch, so all count."""
        if self.mask is None or self.mask.numel() != y.shape[:-1].numel():
            return torch.ones(y.shape[:-1], dtype=torch.float64, device=y.device)
        return self.mask.reshape(y.shape[:-1]).to(y.device, torch.float64)


def _product(module: Any, args: Any, output: Any) -> Tensor | None:
    """The output, or which of several is W x (I-BERT returns a scale with it, a router of Llama 4 scores); None: none
    of them is.
    """
    if isinstance(output, Tensor):
        return output
    weight = getattr(module, "weight", None)
    if not isinstance(output, (tuple, list)) or not args or weight is None or weight.dim() != 2:
        return None
    with torch.no_grad():
        expected = F.linear(args[0], weight, getattr(module, "bias", None))
    found = (one for one in output if isinstance(one, Tensor) and one.shape == expected.shape)
    return next((one for one in found if torch.equal(one, expected)), None)


def _begin(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    hidden = hidden_input(args, kwargs)
    if not hidden.requires_grad:
        hidden.requires_grad_(True)


def _squares(x: Tensor) -> Tensor:
    """Sum of squares over the last dimension, in float64 where the device has it."""
    return x.detach().to(torch.promote_types(x.dtype, torch.float32)).square().sum(-1).double()
