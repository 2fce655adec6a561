"""Hooks on gradients that are whole: one of ours at most on each parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

_HANDLES: Any = WeakIdKeyDictionary()  # parameter -> handle of our hook on it


def hook_gradient(parameter: nn.Parameter, hook: Callable[[Any], None]) -> None:
    """Calls `hook` with the parameter whenever a backward pass has its gradient; an earlier hook of ours goes."""
    unhook_gradients([parameter])
    _HANDLES[parameter] = parameter.register_post_accumulate_grad_hook(hook)


def unhook_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Takes our hooks away."""
    for parameter in parameters:
        handle = _HANDLES.pop(parameter, None)
        if handle is not None:
            handle.remove()
