"""Context managers that restore a model's modes and flags: train or eval, requires_grad, KV cache, checkpointing.

They restore each module and each parameter at the end of the block, also on an exception.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary, ref

from torch import Tensor, nn

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

_held: WeakKeyDictionary[nn.Module, threading.Thread] = WeakKeyDictionary()  # module -> the thread that uses it
_holding = threading.Lock()
# What a module holds in dictionaries of its own; transformers adds hooks in a forward pass.
_ENTRIES = ("_modules", "_parameters", "_buffers", "_forward_hooks")


@contextmanager
def one_thread(model: nn.Module) -> Iterator[None]:
    """Prevents another thread from entering such a block with this model, or a model that shares modules with it.

    Otherwise hooks would see the forward passes of both threads, and one would change modes and weights of the other.

    Raises:
        ValueError: another thread is in such a block.
    """
    taken = _take(model, threading.current_thread())
    try:
        yield
    finally:
        with _holding:
            for module in (each() for each in taken):
                if module is not None:
                    _held.pop(module, None)


def _take(model: nn.Module, mine: threading.Thread) -> list[ref[nn.Module]]:
    """The modules that this thread did not hold before. Weak references, so that replaced modules are freed at once."""
    modules = [*model.modules()]
    with _holding:
        others = [_held[m] for m in modules if _held.get(m, mine) is not mine]
        other = next((thread for thread in others if thread.is_alive()), None)
        if other is not None:
            raise ValueError(
                f"model: expected a model that no other thread uses, got one that is measured or changed in "
                f"{other.name!r}; wait for that thread, or load one model per thread"
            )
        new = [module for module in modules if _held.get(module) is not mine]
        _held.update(dict.fromkeys(new, mine))
    return [ref(module) for module in new]


def for_one_thread(function: Decorated) -> Decorated:
    """Decorator of a function whose first argument is the model that it changes: each call is such a block.

    Put it above `checked`, which reads the annotations where the function is defined.
    """
    first = next(iter(inspect.signature(function).parameters))

    @functools.wraps(function)
    def alone(*arguments: Any, **options: Any) -> Any:
        model = arguments[0] if arguments else options.get(first)
        with one_thread(model) if isinstance(model, nn.Module) else nullcontext():
            return function(*arguments, **options)

    return cast(Decorated, alone)


@contextmanager
def modes_restored(model: nn.Module) -> Iterator[None]:
    """Restores train or eval mode of each module at the end of the block. For one thread at a time (`one_thread`).

    Raises:
        ValueError: another thread is in such a block.
    """
    with one_thread(model):
        modes = [(module, module.training) for module in model.modules()]
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


@contextmanager
def modules_restored(model: nn.Module) -> Iterator[None]:
    """Restores each module's attributes, submodules, parameters and buffers at the end of the block; what is in the
    tensors is not restored.

    A forward pass may change them: BigBird replaces its attention when it runs on a few tokens.
    """
    before = [(vars(m), dict(vars(m)), [(vars(m)[n], dict(vars(m)[n])) for n in _ENTRIES]) for m in model.modules()]
    try:
        yield
    finally:
        for attributes, values, entries in before:
            attributes.clear()
            attributes.update(values)
            for held, contents in entries:
                held.clear()
                held.update(contents)


@contextmanager
def gradients_restored(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Restores `requires_grad` of each parameter at the end of the block."""
    flags = [(parameter, parameter.requires_grad) for parameter in parameters]
    try:
        yield
    finally:
        for parameter, required in flags:
            parameter.requires_grad_(required)


@contextmanager
def cache_restored(config: Any) -> Iterator[None]:
    """Restores `use_cache` of the config at the end of the block; does nothing for None or a config without it."""
    with _entries_restored(config, ["use_cache"]):
        yield


@contextmanager
def without_cache(model: Any) -> Iterator[None]:
    """Without a KV cache inside the block, also in a model that has no config."""
    config: Any = getattr(model, "config", None)
    text: Any = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    with cache_restored(text):
        if getattr(text, "use_cache", None) is not None:
            text.use_cache = False
        yield


@contextmanager
def measuring_config(config: Any) -> Iterator[None]:
    """Without KV cache and without a load-balancing loss inside the block; does nothing for None.

    That loss is of training, and fails if only some layers run.
    """
    names = ["use_cache", "output_router_logits"]
    with _entries_restored(config, names):
        for name in names:
            if getattr(config, name, None) is not None:
                setattr(config, name, False)
        yield


@contextmanager
def _entries_restored(config: Any, names: Sequence[str]) -> Iterator[None]:
    before = {name: value for name in names if (value := getattr(config, name, None)) is not None}
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


@contextmanager
def checkpointing_restored(model: Any) -> Iterator[None]:
    """Disables gradient checkpointing at the end of the block if the block enabled it. No block here disables it."""
    before = _checkpoints(model)
    try:
        yield
    finally:
        if _checkpoints(model) and not before:
            model.gradient_checkpointing_disable()


def _checkpoints(model: nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
