"""Weights that a model changes by itself in eval mode, and changes back in train mode (RWKV rescales two matrices).

A function that changes such a model works on the weights as they are in eval mode, and leaves them as a file holds
them: it ends with a forward pass in train mode. Whether that restores each bit is tried first; if not, the model is
refused.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from hf_cod.layers.devices import random_state_restored
from hf_cod.layers.modes import modes_restored
from hf_cod.layers.probe_inputs import probe_inputs
from hf_cod.layers.stack import unwrap

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

# Model -> the end of the function that changes it.
_changing: WeakKeyDictionary[nn.Module, ExitStack] = WeakKeyDictionary()


def undoing_own_changes(function: Decorated) -> Decorated:
    """Decorator of a function whose first argument is the model that it changes, see `undone_at_the_end`."""
    first = next(iter(inspect.signature(function).parameters))

    @functools.wraps(function)
    def undoing(*arguments: Any, **options: Any) -> Any:
        model = arguments[0] if arguments else options.get(first)
        if not isinstance(model, nn.Module) or unwrap(model) in _changing:
            return function(*arguments, **options)
        with ExitStack() as end:
            _changing[unwrap(model)] = end
            end.callback(_changing.pop, unwrap(model))
            return function(*arguments, **options)

    return cast(Decorated, undoing)


def undone_at_the_end(model: nn.Module, names: Sequence[str]) -> bool:
    """Whether changes of these weights by the model itself are undone when the function that was called ends.

    From here to there the weights are those of eval mode. The model is unchanged if the answer is no.
    """
    end = _changing.get(model)
    if end is None:
        return False
    before = {name: model.get_parameter(name).detach().clone() for name in names}
    flags = [(vars(module), dict(vars(module))) for module in model.modules()]
    try:
        _run(model, training=True)
        stored = {name: model.get_parameter(name).detach().clone() for name in names}
        _run(model, training=False)
        _run(model, training=True)
        restored = all(torch.equal(model.get_parameter(name), tensor) for name, tensor in stored.items())
    except Exception:  # whatever a model raises on inputs that may be none for it
        restored = False
    if not restored:
        _put_back(model, before, flags)
        return False
    _run(model, training=False)
    end.callback(_run, model, training=True)
    return True


@torch.no_grad()
def _put_back(model: nn.Module, weights: dict[str, Tensor], flags: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    for name, tensor in weights.items():
        model.get_parameter(name).copy_(tensor)
    for attributes, values in flags:
        attributes.update(values)


@torch.no_grad()
def _run(model: nn.Module, training: bool) -> None:
    """A forward pass of a few tokens. It changes weights, and what the model notes of that, but no buffers."""
    inputs, device = probe_inputs(model)
    with modes_restored(model), random_state_restored(model), _buffers_restored(model), device:
        model.train(training)
        model(**inputs)


@contextmanager
def _buffers_restored(model: nn.Module) -> Iterator[None]:
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, values in before:
            buffer.copy_(values)
