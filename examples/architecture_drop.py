"""What `architectures.py` checks of `drop` and `skip`: the first, the second and the last layer of each stack."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from architecture_comparison import (
    Remark,
    WrongResult,
    check_reload,
    distance,
    is_refusal,
    outputs_of,
    same,
    unchanged_if_refused,
)
from architecture_images import NoImagesError, form_of
from architecture_references import generates_alike
from tiny_architectures import LANGUAGE, Case
from torch import Tensor

from hf_cod import drop, find_decoder_layers, skip
from hf_cod.layers.running import hidden_input
from hf_cod.layers.stacks import named_stacks

TOLERANCE = 1e-4  # of sums in another order


def check_drop(case: Case) -> str | None:
    """Skip = a layer that returns its input = drop, of the first, the second and the last layer of each stack in turn;
    generation with a cache = without; a reload is equal. A stack works if one of these layers can be removed.
    """
    stacks = [case.stack] if case.stack else [stack.name for stack in named_stacks(case.build())] or [None]
    wrong: list[str] = []
    refusals: list[ValueError] = []
    excluded: list[str] = []
    remarks: list[str] = []
    for stack in stacks:
        found = _removed(case, stack)
        some = [layer for layer, why in found.items() if isinstance(why, ValueError)]
        wrong += [f"{_called(stack, i)}: {why}" for i, why in found.items() if isinstance(why, WrongResult)]
        excluded += [why for why in found.values() if isinstance(why, str)]
        if len(some) == len(found):
            refusals.append(found[some[0]])
        remarks += [f"{_called(stack, layer)} is refused: {found[layer]}" for layer in some]
    if wrong:
        raise WrongResult("; ".join(wrong))
    if refusals:
        raise refusals[0]
    if excluded:
        return "; ".join(dict.fromkeys(excluded))
    return Remark("; ".join(remarks)) if remarks else None


def _removed(case: Case, stack: str | None) -> dict[int, ValueError | WrongResult | str | None]:
    """Layer -> None if its removal is right, a refusal, a difference, or what was not checked."""
    depth = len(find_decoder_layers(case.build(), stack))
    found: dict[int, ValueError | WrongResult | str | None] = {}
    for layer in sorted({0, min(1, depth - 1), depth - 1}):
        try:
            found[layer] = _check_layer(case, stack, layer)
        except WrongResult as error:
            found[layer] = error
        except Exception as error:  # any other one than a refusal is one that a user would see as a traceback
            line = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            found[layer] = error if isinstance(error, ValueError) and is_refusal(error) else WrongResult(line)
    return found


def _check_layer(case: Case, stack: str | None, layer: int) -> str | None:
    """Removes one layer of an intact model; returns what was not checked."""
    model = case.build()
    intact = outputs_of(case, model)
    with unchanged_if_refused(model), skip(model, layer, stack):
        skipped = outputs_of(case, model)
    same(outputs_of(case, model), intact, "the model after skip", 0)
    unchecked = _passed_on(case, model, stack, layer, skipped)
    with unchanged_if_refused(model):
        drop(model, layer, stack)
    same(skipped, outputs_of(case, model), "skip against drop", 0)
    check_reload(case, model)
    return unchecked or generates_alike(case, model)


def _passed_on(case: Case, model: Any, stack: str | None, layer: int, skipped: Tensor) -> str | None:
    """Requires that the model with a layer that returns its input has the outputs of the model without it; returns why
    that is not known.

    Of what else the first layer returns, such as a state for the next one, its own or none may be right.
    """
    layers = find_decoder_layers(model, stack)
    with passing_on(layers, layer) as calls:
        passed = outputs_of(case, model)
    if not calls:
        return _not_run(case, stack, layer)
    if layer == 0 and distance(skipped, passed) > TOLERANCE:
        with passing_on(layers, layer, own=False), suppress(Exception):  # whatever a model raises without this state
            passed = outputs_of(case, model)
        alone = {name for name, _ in layers[0].named_modules()} - {name for name, _ in layers[-1].named_modules()}
        if alone and distance(skipped, passed) > TOLERANCE:
            return f"layer 0 is not compared with one that returns its input: it alone has {', '.join(sorted(alone))}"
    same(skipped, passed, "skip against a layer that returns its input", TOLERANCE)
    return None


def _not_run(case: Case, stack: str | None, layer: int) -> str | None:
    """Why a layer does not run on the inputs; None if another kind has the inputs on which it does."""
    if case.group != LANGUAGE or case.images or stack in ("text", "decoder", None):
        return f"{_called(stack, layer)} does not run on the inputs, or not by a call"
    try:
        form_of(case)
    except NoImagesError as error:
        return f"the {stack} stack is not run on images: {error}"
    return None


def _called(stack: str | None, layer: int) -> str:
    return f"layer {layer}" if stack is None else f"layer {layer} of {stack}"


def _alike(one: Any, other: Any) -> bool:
    return isinstance(one, Tensor) and isinstance(other, Tensor) and one.shape == other.shape


def _given(index: int, state: Any, hidden: Tensor, args: Any, kwargs: dict[str, Any], own: bool) -> Any:
    """What a first layer that returns its input hands on beside it: a state that is an input as well, such as the
    global tokens of Pegasus-X and the second stream of Reformer; else its own, or None.
    """
    if index < len(args) and _alike(args[index], state):
        return args[index]
    alike = (value for value in kwargs.values() if value is not hidden and _alike(value, state))
    return next(alike, state if own else None)


@contextmanager
def passing_on(stack: Any, index: int, own: bool = True) -> Iterator[list[int]]:
    """Within the block a layer runs, but hands on its input; what else layers return is that of the layer before. Adds
    to the list for each call; a model that calls the `forward` of its layers (SqueezeBERT) has no hooks.

    Args:
        stack: the layers.
        index: the layer.
        own: what else the first layer returns is its own, such as T5's position biases, which all layers use; False:
            there is none, as for Zaya's first router, which has no router before it.
    """
    calls: list[int] = []
    before: list[Any] = []

    def return_input(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        calls.append(index)
        hidden = hidden_input(args, kwargs)
        if not isinstance(output, (tuple, list)):
            return hidden
        given = [_given(i, state, hidden, args, kwargs, own) for i, state in enumerate(output)]
        handed = [hidden, *(before[-1] if before else given)[1:]]
        return (
            output._replace(**dict(zip(output._fields, handed, strict=True)))
            if hasattr(output, "_fields")
            else type(output)(handed)
        )

    # First, because transformers captures hidden states by hooks as well.
    handles = [stack[index].register_forward_hook(return_input, with_kwargs=True, prepend=True)]
    if index:
        handles.append(stack[index - 1].register_forward_hook(lambda module, args, output: before.append(output)))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
