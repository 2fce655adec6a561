"""UpdateInBackward: weights that are updated inside the backward pass, so that their gradients are freed at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from weakref import WeakMethod

import torch
from accelerate.state import AcceleratorState, is_initialized
from torch import Tensor, nn

from hf_cod.layers.replicas import processes
from hf_cod.training.owlore.active_layers import hook_gradient

_SCALED = "expected no loss scaling, got a GradScaler; train in bfloat16, or set fused=False"


class UpdateInBackward:
    """Lets an optimizer update each weight as soon as its gradient is whole; nothing once the optimizer is gone.

    Args:
        update: the optimizer's method that updates one weight by its gradient.
        parameters: what the optimizer trains.

    Raises:
        ValueError: in a backward pass: a second one in a step, several processes, gradients that are not finite; under
            loss scaling, here if accelerate knows of it, else in the first step.
    """

    def __init__(self, update: Callable[[nn.Parameter], None], parameters: Iterable[nn.Parameter]) -> None:
        if is_initialized() and AcceleratorState().mixed_precision == "fp16":
            raise ValueError(f"fused: {_SCALED}")
        self._update = WeakMethod(update)
        self._updated: set[Tensor] = set()
        for parameter in parameters:
            hook_gradient(parameter, self)

    @torch.no_grad()
    def __call__(self, parameter: nn.Parameter) -> None:
        """The hook."""
        update = self._update()
        if update is None:
            return
        if parameter in self._updated:
            raise ValueError("fused: expected one backward pass a step, got more; accumulation needs fused=False")
        if processes() > 1:
            raise ValueError("fused: expected one process, got several; set fused=False")
        if not bool(torch.isfinite(parameter.grad).all()):  # type: ignore[arg-type]
            raise ValueError(
                "gradients: expected finite numbers, got NaN or infinity; set fused=False to skip such steps"
            )
        update(parameter)
        parameter.grad = None
        self._updated.add(parameter)

    def end_step(self, scaled: bool) -> None:
        """What is left to do in `step`; `scaled`: a GradScaler called for it."""
        if scaled:
            raise ValueError(f"fused: {_SCALED}; the weights have moved once by a scaled gradient")
        self._updated.clear()
