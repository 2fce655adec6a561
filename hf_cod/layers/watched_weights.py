"""Weights whose reads from outside of their module's call are recorded, for `direct_use.py`."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_cod.layers.modules import is_linear_like
from hf_cod.layers.orientation import shape_of


def version_of(tensor: Tensor) -> int:
    """How often a tensor has been changed in place; 0 in inference mode, which does not count."""
    return 0 if tensor.is_inference() else tensor._version


class Watched(dict[str, Any]):
    """The parameters of a module; reads of its weight from outside of its call are recorded, and get a copy.

    Also those by `parameters`, `named_parameters` and `state_dict`, of this module or of one around it. Nothing is
    recorded before `begin`.
    """

    def __init__(self, parameters: Mapping[str, Any]) -> None:
        super().__init__(parameters)
        self.depth = 1
        self.called = False
        self.read = False
        self.no_tensor = False
        self.size = parameters["weight"].numel()
        self._copy: Tensor | None = None
        self._written = False

    def __getitem__(self, name: str) -> Any:
        tensor = super().__getitem__(name)
        if self.depth or name != "weight" or tensor is None:
            return tensor
        self.read = True
        if type(tensor) is not nn.Parameter:  # quantized by another library, whose attributes a copy would lose
            return tensor
        if self._copy is None:
            self._copy = nn.Parameter(tensor.detach().clone(), requires_grad=False)
        return self._copy

    def get(self, name: str, default: Any = None) -> Any:
        """As of a dict, recorded."""
        try:
            return self[name]
        except KeyError:
            return default

    def items(self) -> Any:
        """As of a dict, recorded."""
        return {name: self[name] for name in self}.items()

    def values(self) -> Any:
        """As of a dict, recorded."""
        return {name: self[name] for name in self}.values()

    def begin(self) -> None:
        """Records reads from here on."""
        self.depth = 0

    def apply(self, module: nn.Module, *arguments: Any) -> nn.Module:
        """`Module._apply`, by which a model changes the dtype or device of a module while it runs: not a read."""
        self.depth += 1
        try:
            return type(module)._apply(module, *arguments)
        finally:
            self.depth -= 1

    def enter(self, *_: Any) -> None:
        """A forward pre-hook: what the module itself reads is its own; the copy is freed."""
        self.depth, self.called = self.depth + 1, True
        self._written = self.is_written()
        self._copy = None

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """A forward hook."""
        self.depth -= 1
        self.no_tensor = self.no_tensor or not isinstance(output, Tensor)

    def is_written(self) -> bool:
        """Whether the model has changed the copy."""
        if self._written or self._copy is None:
            return self._written
        weight = super().__getitem__("weight")
        # `copy.data` changes without a new version.
        return bool(version_of(self._copy)) or not (weight.is_meta or torch.equal(weight, self._copy))


def watch(module: nn.Module, block: ExitStack) -> Watched:
    """Watches the weight of a Linear-like module until the end of `block`."""
    watched = Watched(module._parameters)
    vars(module)["_parameters"] = watched  # nn.Module.__getattr__ looks into it
    vars(module)["_apply"] = partial(watched.apply, module)
    if type(module) in (nn.Linear, Conv1D) and "forward" not in vars(module):
        # What it computes does not matter here, and to read all weights would be most of the pass's time.
        vars(module)["forward"] = partial(_zeros, shape_of(module)[0])
    block.callback(module.register_forward_pre_hook(watched.enter).remove)
    block.callback(module.register_forward_hook(watched.leave).remove)
    return watched


def _zeros(out: int, input: Tensor) -> Tensor:
    return input.new_zeros(*input.shape[:-1], out)


def is_watched(module: nn.Module) -> bool:
    """Whether a module is Linear-like and has a weight."""
    return is_linear_like(module) and module._parameters.get("weight") is not None
