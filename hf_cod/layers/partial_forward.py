"""The model's own forward over some of its layers, with its own masks, positions and caches."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_cod.layers.capturing import capturing_hooks, capturing_restored
from hf_cod.layers.layer_calls import check_first_call
from hf_cod.layers.running import NonFiniteError, hidden_input, hidden_output
from hf_cod.layers.stack import DecoderLayers

State = tuple[Tensor, tuple[Any, ...] | None]
"""The output of a layer: its hidden state (S, T, d), and the other elements if it returns a tuple or list."""


def run_layer(
    stack: DecoderLayers,
    layer: int,
    inputs: Mapping[str, Tensor],
    before: State | None,
    finished: int | None = None,
) -> State:
    """Runs one layer of the stack inside the model's forward, without the head.

    Args:
        stack: the layers.
        layer: index of the layer.
        inputs: inputs of the model's forward.
        before: output of the layer before; None for layer 0, which gets the model's embeddings of the inputs.
        finished: as in `running_only`.

    Returns:
        The output of the layer.
    """
    with running_only(stack, range(layer, layer + 1), before, finished) as outputs:
        stack.trunk(**inputs)
    if outputs:
        return outputs[-1]
    if before is None:
        raise ValueError(f"layers: expected inputs on which layer {layer} runs, got others")
    return before  # the model passes over the layer on these inputs


@contextmanager
def running_only(
    stack: DecoderLayers, layers: range, before: State | None, finished: int | None = None
) -> Iterator[list[State]]:
    """Within the block the model's forward runs only these layers.

    The first one gets `before` as its input, and the output of the last one bypasses all later layers. That output is
    appended to the list.

    Args:
        stack: the layers.
        layers: those that run.
        before: the state before the first of them; None for the model's embeddings.
        finished: the number of layers after which `before` was taken, if some are removed between it and the first of
            `layers`; default: all before that one. Removed layers return their input, to which the model may have done
            something after the layer before: DeBERTa-v2 has a convolution there.

    Raises:
        ValueError: the model runs the last of them several times.
    """
    outputs: list[State] = []
    called: set[int] = set()

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        check_first_call(stack, layers[-1], called)
        outputs.append(state_of(output))

    passages = OrderedDict(stack.module_list._modules)
    rest = None if before is None else before[1]
    done = layers.start if finished is None else finished
    for i in range(len(stack)):
        if i < layers.start:
            # In place of each, because the model may pass over the last one.
            stored = before[0] if before is not None and i < done else None
            passages[str(i)] = Passage(stack[i], stored, lambda: rest)
        elif i >= layers.stop:
            passages[str(i)] = Passage(stack[i], None, lambda: outputs[-1][1] if outputs else rest)
    handles = [stack[i].register_forward_hook(keep) for i in layers[-1:]]
    try:
        with exchanged_layers(stack, passages):
            yield outputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def returned_beside(stack: DecoderLayers) -> Iterator[dict[int, tuple[Any, ...] | None]]:
    """Records for each layer that runs in the block what it returns beside its hidden state, as in `State`.

    Raises:
        ValueError: a layer returns more than its hidden state.
    """
    found: dict[int, tuple[Any, ...] | None] = {}

    def hook_of(index: int) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            found[index] = state_of(output)[1]
            if found[index]:
                raise ValueError(
                    f"model: expected layers that return their hidden state alone if they run several times, got "
                    f"{stack.layers_path}.{index} of {type(stack.model).__name__}, which returns more"
                )

        return keep

    handles = [layer.register_forward_hook(hook_of(index)) for index, layer in enumerate(stack)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def passed_over(stack: DecoderLayers, rests: Mapping[int, tuple[Any, ...] | None]) -> Iterator[None]:
    """Within the block these layers return their input at each of their runs in a forward pass, and the value of the
    mapping beside it, see `State`."""
    passages = OrderedDict(stack.module_list._modules)
    passages.update({str(i): Passage(stack[i], None, partial(_same, rest)) for i, rest in rests.items()})
    with exchanged_layers(stack, passages):
        yield


@contextmanager
def running_from(
    stack: DecoderLayers, start: int, before: State | None, replaced: Mapping[int, nn.Module]
) -> Iterator[None]:
    """Within the block the model's forward begins at a layer, and runs other modules in the place of some layers.

    Args:
        stack: the layers.
        start: the first layer that runs.
        before: output of the layer before it; None lets the whole model run.
        replaced: number of a layer -> module that runs in its place.
    """
    passages = OrderedDict(stack.module_list._modules)
    for i in range(start if before is not None else 0):
        passages[str(i)] = Passage(
            stack[i], before[0] if before else None, partial(_same, before[1] if before else None)
        )
    passages.update({str(i): module for i, module in replaced.items()})
    with exchanged_layers(stack, passages):
        yield


@contextmanager
def last_states(stack: DecoderLayers, last: State, earlier: Tensor) -> Iterator[None]:
    """Within the block the last layer returns `last`, and all others `earlier` as their hidden state."""
    passages = OrderedDict(stack.module_list._modules)
    for i in range(len(stack)):
        stored = last[0] if i == len(stack) - 1 else earlier
        passages[str(i)] = Passage(stack[i], stored, partial(_same, last[1]))
    with exchanged_layers(stack, passages):
        yield


@contextmanager
def exchanged_layers(stack: DecoderLayers, modules: OrderedDict[str, Any]) -> Iterator[None]:
    """Within the block the model runs these modules in place of its layers."""
    own = stack.module_list._modules
    with capturing_restored(stack.model):
        try:
            stack.module_list._modules = modules
            yield
        finally:
            stack.module_list._modules = own


@contextmanager
def layer_states(stack: DecoderLayers) -> Iterator[list[Any]]:
    """Appends the state before each layer, and after the last one, to the list while the block runs the model.

    A layer that the model passes over has the state of the next one that runs. What else layers return is unknown
    before the first one, whose own is taken: right for T5's position biases, not for a router's state.

    Raises:
        ValueError: the model runs a layer several times.
    """
    states: list[Any] = []
    last: list[State] = []
    called: set[int] = set()

    def keep(index: int, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        check_first_call(stack, index, called)
        # Not the input of the layer, to which the model may have added something after the layer before: Qwen3-VL.
        before = last[0] if last else (hidden_input(args, kwargs), state_of(output)[1])
        states.extend([before] * (index + 1 - len(states)))
        last[:] = [state_of(output)]
        if index == len(stack) - 1:
            states.extend(last)

    def end(module: nn.Module, args: Any, output: Any) -> None:
        states.extend(last * (len(stack) + 1 - len(states)))

    def hook_of(index: int) -> Any:
        return lambda module, args, kwargs, output: keep(index, args, kwargs, output)

    handles = [layer.register_forward_hook(hook_of(i), with_kwargs=True) for i, layer in enumerate(stack)]
    handles.append(stack.trunk.register_forward_hook(end))
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def check_finite(states: list[Any], number: int) -> None:
    """Checks that all states of `layer_states` are finite.

    Raises:
        NonFiniteError: a state is not finite; says in which layer first, and in which batch.
    """
    sums = torch.stack([hidden.float().sum().cpu() for hidden, _ in states])
    broken = (~sums.isfinite()).nonzero()
    if len(broken):
        raise NonFiniteError(int(broken[0]), number)


def state_of(output: Any) -> State:
    """A layer's output as a state."""
    return hidden_output(output), tuple(output[1:]) if isinstance(output, (tuple, list)) else None


def _same(value: Any) -> Any:
    return value


class Passage(nn.Module):
    """Replaces a layer and returns the stored hidden state, or else its input.

    All other attributes that the model reads (for example the attention type) are those of the replaced layer, and
    transformers captures its output in the same way: a vision tower may hand on the hidden states of its layers.
    """

    def __init__(self, layer: nn.Module, stored: Tensor | None, rest: Any) -> None:
        super().__init__()
        self.__dict__.update(layer=layer, stored=stored, rest=rest)  # the layer is not a submodule of this one
        self._forward_hooks.update(capturing_hooks(layer))

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The class of the layer, by which transformers finds what to capture."""
        return type(self.__dict__["layer"])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["layer"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Takes and returns what the layer does."""
        hidden = hidden_input(args, kwargs)
        if self.stored is not None:
            hidden = self.stored.to(hidden.device)
        return self.with_rest(hidden)

    def with_rest(self, hidden: Tensor) -> Any:
        """The output of a layer with this hidden state."""
        rest = self.rest()
        return hidden if rest is None else (hidden, *rest)
