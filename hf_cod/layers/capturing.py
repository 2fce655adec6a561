"""Hooks with which transformers captures hidden states, while the layers of a model are exchanged.

Transformers adds them once, to the layers that a model has when hidden states are first asked for. Layers that are put
back later would have none, and the model would return too few hidden states from then on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import output_capturing

# The attribute by which transformers knows that a model has its hooks.
_ADDED = "_output_capturing_hooks_installed"


def capturing_hooks(module: nn.Module) -> dict[int, Any]:
    """The hooks of a module with which transformers captures its output."""
    return {
        key: hook
        for key, hook in module._forward_hooks.items()
        if getattr(hook, "__module__", None) == output_capturing.__name__
    }


@contextmanager
def capturing_restored(model: nn.Module) -> Iterator[None]:
    """Removes the hooks that transformers adds inside the block, so that it adds them again to all layers later."""
    without = [m for m in model.modules() if isinstance(m, PreTrainedModel) and not getattr(m, _ADDED, False)]
    before = {m: capturing_hooks(m).keys() for each in without for m in each.modules() if m._forward_hooks}
    try:
        yield
    finally:
        for each in (m for m in without if getattr(m, _ADDED, False)):
            delattr(each, _ADDED)
            for module in each.modules():
                for key in capturing_hooks(module).keys() - before.get(module, set()):
                    del module._forward_hooks[key]
