"""The one place that gives a model its modes and flags back: train or eval, requires_grad, KV cache, checkpointing.

What a block changes comes back behind it, module by module and parameter by parameter, on an exception, too.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

_held: WeakKeyDictionary[nn.Module, threading.Thread] = WeakKeyDictionary()  # module -> who works on it
_holding = threading.Lock()


@contextmanager
def one_thread(model: nn.Module) -> Iterator[None]:
    """No other thread of ours enters such a block with this model, or one that shares modules with it.

    Hooks would see the forward passes of both, and modes and weights would change under one of them.

    Raises:
        ValueError: another thread is in one.
    """
    mine, modules = threading.current_thread(), [*model.modules()]
    with _holding:
        others = [_held[m] for m in modules if _held.get(m, mine) is not mine]
        other = next((thread for thread in others if thread.is_alive()), None)
        if other is not None:
            raise ValueError(
                f"model: expected one that no other thread works on, got one that is measured or changed in "
                f"{other.name!r}; wait for it, or give each thread a model of its own"
            )
        new = [module for module in modules if _held.get(module) is not mine]
        _held.update(dict.fromkeys(new, mine))
    try:
        yield
    finally:
        with _holding:
            for module in new:
                _held.pop(module, None)


@contextmanager
def modes_restored(model: nn.Module) -> Iterator[None]:
    """Each module is in train or eval mode again, as before the block, which one thread is in (`one_thread`).

    Raises:
        ValueError: another thread is in one.
    """
    with one_thread(model):
        modes = [(module, module.training) for module in model.modules()]
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


@contextmanager
def gradients_restored(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Each parameter requires a gradient again, or none, as before the block."""
    flags = [(parameter, parameter.requires_grad) for parameter in parameters]
    try:
        yield
    finally:
        for parameter, required in flags:
            parameter.requires_grad_(required)


@contextmanager
def cache_restored(config: Any) -> Iterator[None]:
    """The config's `use_cache` is again what it was before the block; a config without it, or None, stays without."""
    before = getattr(config, "use_cache", None)
    try:
        yield
    finally:
        if before is not None:
            config.use_cache = before


@contextmanager
def checkpointing_restored(model: Any) -> Iterator[None]:
    """Gradient checkpointing that the block switches on ends with it; no block of ours switches it off."""
    before = _checkpoints(model)
    try:
        yield
    finally:
        if _checkpoints(model) and not before:
            model.gradient_checkpointing_disable()


def _checkpoints(model: nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
