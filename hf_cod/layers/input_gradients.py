"""Training of models that run their layers without recording gradients, such as reversible ones (Reformer).

Such a model computes the gradients of its layers itself, in a backward pass that starts only if the layers' input
requires a gradient. With frozen embeddings it does not, and no weight would get a gradient.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_cod.layers.direct_use import direct_use
from hf_cod.layers.stack import DecoderLayers

_hooks: WeakKeyDictionary[nn.Module, RemovableHandle] = WeakKeyDictionary()


def require_input_gradients(stack: DecoderLayers) -> None:
    """Makes the output of the embeddings require a gradient, if the model runs its layers without recording them.

    Other models are left as they are, so that their backward pass ends at the lowest layer that trains.
    """
    unrecorded = direct_use(stack.model).without_gradients
    own = any(f"{stack.layers_path}.{index}" in unrecorded for index in range(len(stack)))
    if own and stack.embeddings is not None and stack.model not in _hooks:
        _hooks[stack.model] = stack.embeddings.register_forward_hook(_require)


def release_input_gradients(model: nn.Module) -> None:
    """Ends what `require_input_gradients` began."""
    handle = _hooks.pop(model, None)
    if handle is not None:
        handle.remove()


def _require(module: nn.Module, args: Any, output: Any) -> None:
    if isinstance(output, Tensor) and output.is_floating_point() and torch.is_grad_enabled():
        output.requires_grad_(True)
