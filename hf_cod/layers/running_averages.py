"""BatchNorms whose weights do not train keep their running averages in training, so that nothing frozen changes.

In train mode a BatchNorm normalizes by its batch and changes its running mean and variance in place, also if its
weights are frozen. An adapter that was trained so would be loaded onto a base with other averages.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from torch.utils.hooks import RemovableHandle

_hooks: WeakKeyDictionary[nn.Module, list[RemovableHandle]] = WeakKeyDictionary()  # owner -> hooks


def keep_averages(model: nn.Module, owner: nn.Module | None = None) -> None:
    """Runs modules with a running mean in eval mode while a weight of theirs is frozen, until `release_averages`.

    It is looked up in each forward pass, because sampled layers are frozen and unfrozen, and Trainer sets train mode
    in each step. A module without weights counts as frozen if a weight is of the smallest module around it with any.

    Args:
        model: a model, with adapters or without.
        owner: who releases it; default: the model. A second call of an owner does nothing.
    """
    owner = model if owner is None else owner
    if owner in _hooks:
        return
    found = _hooks[owner] = []
    named = dict(model.named_modules())
    for name, module in named.items():
        if module._buffers.get("running_mean") is None:
            continue
        around = name
        while around and next(named[around].parameters(), None) is None:
            around = around.rpartition(".")[0]
        kept = _Kept(() if around == name else tuple(named[around].parameters()))
        found.append(module.register_forward_pre_hook(kept.enter, prepend=True))
        found.append(module.register_forward_hook(kept.leave, always_call=True))


@contextmanager
def averages_kept(model: nn.Module) -> Iterator[None]:
    """`keep_averages` within the block."""
    block = nn.Module()  # another owner than an optimizer within
    keep_averages(model, block)
    try:
        yield
    finally:
        release_averages(block)


def release_averages(owner: nn.Module) -> None:
    """Ends what `keep_averages` began for this owner."""
    for handle in _hooks.pop(owner, []):
        handle.remove()


class _Kept:
    """The hooks of one module. Several may be on a module: the one that changes its mode also restores it."""

    def __init__(self, around: tuple[nn.Parameter, ...]) -> None:
        self.around = around
        self.changed = False

    def enter(self, module: nn.Module, args: Any) -> None:
        if module.training and not all(p.requires_grad for p in self.around or module.parameters()):
            module.training, self.changed = False, True

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.changed:
            module.training, self.changed = True, False
