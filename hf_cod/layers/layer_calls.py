"""How a model runs its layers, found in forward passes that are made anyway.

A layer runs once in a forward pass, and returns its hidden state alone or first in a tuple. Hooks on a layer that runs
several times (loops over depth) would mix the passes, and a layer that stands in for another one must return its kind
of output.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from hf_cod.layers.modes import gradients_restored
from hf_cod.layers.running import described_output, hidden_output
from hf_cod.layers.stack import DecoderLayers
from hf_cod.layers.stacks import module_lists

REPEATED = "runs several times in a forward pass"
SEVERAL_TIMES = "a model that runs the same layers several times cannot be treated layer by layer"


def check_first_call(stack: DecoderLayers, index: int, called: set[int]) -> None:
    """Records that a layer is called, in the set of those that this forward pass has called.

    Raises:
        ValueError: it has been called before.
    """
    if index in called:
        raise ValueError(_runs_again(stack, index))
    called.add(index)


def check_runs(stack: DecoderLayers, runs: Sequence[int]) -> None:
    """Checks that each layer runs once.

    Args:
        stack: the layers.
        runs: number of runs of each layer in a forward pass.

    Raises:
        ValueError: a layer that runs several times.
    """
    for index, count in enumerate(runs):
        if count > 1:
            raise ValueError(_runs_again(stack, index))


def _runs_again(stack: DecoderLayers, index: int) -> str:
    return (
        f"model: expected layers that run once in a forward pass, got {stack.layers_path}.{index} of "
        f"{type(stack.model).__name__}, which runs again; {SEVERAL_TIMES}"
    )


def layers_obstacle(stack: DecoderLayers, found: Mapping[str, str]) -> str | None:
    """Why the layers cannot be run one at a time, from `LayerCalls.obstacles` of the model; None if they can."""
    names = (f"{stack.layers_path}.{index}" for index in range(len(stack)))
    return next((f"{name} {found[name]}" for name in names if name in found), None)


@contextmanager
def observed_calls(model: nn.Module, training: bool) -> Iterator[LayerCalls]:
    """Observes the layers. In training gradients are enabled, to see which layers do not record them; weights require
    none, so that no activation is kept.
    """
    required = [p for p in model.parameters() if p.requires_grad and not p.is_inference()] if training else []
    calls = LayerCalls()
    with gradients_restored(required), ExitStack() as block, torch.set_grad_enabled(training):
        for p in required:
            p.requires_grad_(False)
        calls.attach(model, block)
        yield calls


class LayerCalls:
    """Observes the layers of all stacks of a model during one forward pass.

    Attributes:
        obstacles: name of a layer -> what it does, if it cannot be run by itself.
        tokens_first: names of layers whose hidden states are (tokens, samples, width).
        without_gradients: names of layers that the model runs without recording gradients, though they are enabled.
    """

    def __init__(self) -> None:
        self.obstacles: dict[str, str] = {}
        self.tokens_first: list[str] = []
        self.without_gradients: list[str] = []
        self._calls: Counter[str] = Counter()

    def attach(self, model: nn.Module, block: ExitStack) -> None:
        """Adds hooks to the layers until the end of `block`."""
        recorded = torch.is_grad_enabled()
        for path, layers in module_lists(model).items():
            for index, layer in enumerate(layers):
                enter, leave = self._hooks_of(f"{path}.{index}", recorded)
                block.callback(layer.register_forward_pre_hook(enter).remove)
                block.callback(layer.register_forward_hook(leave).remove)

    def _hooks_of(self, name: str, recorded: bool) -> tuple[Callable[..., None], Callable[..., None]]:
        def enter(*_: Any) -> None:
            self._calls[name] += 1
            if self._calls[name] == 2:
                self.obstacles[name] = REPEATED
            if recorded and not torch.is_grad_enabled() and name not in self.without_gradients:
                self.without_gradients.append(name)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            try:
                state = hidden_output(output)
                # The inputs are one sample of several tokens.
                if state.dim() == 3 and len(state) > 1 == state.shape[1] and name not in self.tokens_first:
                    self.tokens_first.append(name)
            except ValueError:
                self.obstacles.setdefault(name, f"returns {described_output(output)}")

        return enter, leave
