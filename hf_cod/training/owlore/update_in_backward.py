"""UpdateInBackward: updates weights inside the backward pass, so that their gradients are freed at once."""

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
    """Calls an optimizer's update for each weight as soon as its gradient is complete.

    The hooks do nothing after the optimizer is deleted.

    Args:
        update: the optimizer's method that updates one weight by its gradient.
        parameters: the parameters that the optimizer trains.

    Raises:
        ValueError: loss scaling: here if accelerate has fp16 configured, else in the first step. In a backward pass:
            a second backward pass in one step, several processes, gradients that are not finite.
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
        """The hook: updates the parameter and frees its gradient."""
        update = self._update()
        if update is None:
            return
        if parameter in self._updated:
            raise ValueError(
                "fused: expected one backward pass per step, got more; set fused=False for gradient accumulation"
            )
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
        """Completes a step, in `step`; `scaled`: a GradScaler called `step`."""
        if scaled:
            raise ValueError(f"fused: {_SCALED}; the weights were updated once by a scaled gradient")
        self._updated.clear()
