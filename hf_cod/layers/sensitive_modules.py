"""Matrices that are small and decide much, found by structure: routers, gates of one row, and latent projections.

- A router has one row for each expert of its layer: an error in it sends tokens to other experts.
- A gate of one row scales a whole branch of a layer by one number for each token.
- A latent projection (multi-head latent attention) has fewer rows than columns, and its output enters a norm whose
  output enters another matrix: all that follows passes through it.

Names of modules are not used. Latent projections are found by the forward pass of `direct_use.py`, which shows tensors
that are handed from module to module unchanged.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from hf_cod.layers.experts import ListedMatrix
from hf_cod.layers.module_choice import by_place, matrix_sizes
from hf_cod.layers.modules import is_norm
from hf_cod.layers.orientation import shape_of
from hf_cod.layers.stack import DecoderLayers

ROUTER = "a router, which has one row for each expert"
GATE = "a gate of one row"
LATENT = "a latent projection, whose output enters a norm and then another matrix"

# Outputs that are remembered: a latent projection, its norm and the next matrix follow closely on each other.
_RECENT = 8


class LatentProjections:
    """Finds latent projections while the model runs.

    Attributes:
        found: their names.
    """

    def __init__(self) -> None:
        self.found: list[str] = []
        # (output, name of the matrix that it comes from)
        self._projected: deque[tuple[Tensor, str]] = deque(maxlen=_RECENT)
        self._normed: deque[tuple[Tensor, str]] = deque(maxlen=_RECENT)

    def attach(self, model: nn.Module, linears: Mapping[str, nn.Module], block: ExitStack) -> None:
        """Adds hooks to matrices and norms until the end of `block`."""
        for name, module in linears.items():
            hooks = [module.register_forward_pre_hook(self._enters_matrix)]
            if shape_of(module)[0] < shape_of(module)[1]:
                hooks.append(module.register_forward_hook(self._leaves_matrix(name)))
            for hook in hooks:
                block.callback(hook.remove)
        for module in model.modules():
            if is_norm(module):
                block.callback(module.register_forward_hook(self._leaves_norm).remove)

    def _leaves_matrix(self, name: str) -> Callable[..., None]:
        def remember(module: nn.Module, inputs: Any, output: Any) -> None:
            if type(output) is Tensor:
                self._projected.append((output, name))

        return remember

    def _leaves_norm(self, module: nn.Module, inputs: Any, output: Any) -> None:
        name = _source(self._projected, inputs)
        if name is not None and type(output) is Tensor:
            self._normed.append((output, name))

    def _enters_matrix(self, module: nn.Module, inputs: Any) -> None:
        name = _source(self._normed, inputs)
        if name is not None and name not in self.found:
            self.found.append(name)


def _source(known: deque[tuple[Tensor, str]], inputs: Any) -> str | None:
    """The matrix that a module's first input comes from: the same tensor or a view of it, so that sums do not count."""
    given = inputs[0] if inputs else None
    if type(given) is not Tensor:  # quantized by another library, or sharded
        return None
    return next((name for tensor, name in known if _memory(tensor) == _memory(given)), None)


def _memory(tensor: Tensor) -> int:
    """Which memory a tensor is in, also on the meta device, where addresses are 0."""
    return tensor.untyped_storage()._cdata


def sensitive_modules(stack: DecoderLayers, latent: Sequence[str]) -> dict[str, str]:
    """Name -> what a matrix of the layers is, for those that are not stored in few bits unless they are included.

    Args:
        stack: the layers.
        latent: names of latent projections, which `direct_use` found.
    """
    found: dict[str, str] = {}
    for index in range(len(stack)):
        sets = stack.expert_sets(index)
        experts = [(place, experts.count) for experts in sets for place in experts.places]
        routers = [experts.router.name for experts in sets if experts.router is not None]
        for name, module in stack.linears(index).items():
            out, width = shape_of(module)
            if name in routers or any(_beside(name, place) for place, count in experts if out == count < width):
                found[name] = ROUTER
            elif out == 1 < width:
                found[name] = GATE
            elif name in latent:
                found[name] = LATENT
    return found


def left_notes(stack: DecoderLayers, left: Mapping[str, str]) -> list[str]:
    """Sentences on matrices that are not quantized; sensitive ones are counted by kind.

    Args:
        stack: the layers.
        left: name -> the reason.
    """
    notes = []
    for kind in (ROUTER, GATE, LATENT):
        names = [name for name, reason in left.items() if reason == kind]
        if names:
            weights = sum(math.prod(shape_of(stack.model.get_submodule(name))) for name in names)
            notes.append(
                f"{len(names)} matri{'x' if len(names) == 1 else 'ces'} of {weights:,} weights not quantized, each "
                f"{kind}: {'; '.join(by_place(names))}; `include` them by name to quantize them"
            )
    return [*notes, *_other_notes(stack, {n: why for n, why in left.items() if why not in (ROUTER, GATE, LATENT)})]


def _other_notes(stack: DecoderLayers, left: Mapping[str, str]) -> Iterator[str]:
    """A sentence for each reason; the matrices of experts that are Linears have one name in it."""
    sizes = matrix_sizes(stack)
    listed = {
        name: matrix.name
        for index in range(len(stack))
        for experts in stack.expert_sets(index)
        for matrix in experts.matrices
        if isinstance(matrix, ListedMatrix) and len({left.get(name) for name in matrix.linears}) == 1
        for name in matrix.linears
    }
    for reason in dict.fromkeys(left.values()):
        names = [name for name, why in left.items() if why == reason]
        if len(names) == 1:
            yield f"{names[0]} is not quantized: {reason}"
        else:
            places = by_place(dict.fromkeys(listed.get(name, name) for name in names))
            weights = sum(sizes.get(name, 0) for name in names)
            yield f"{len(names)} matrices of {weights:,} weights are not quantized ({reason}): {'; '.join(places)}"


def _beside(name: str, experts: str) -> bool:
    """Whether a matrix is beside these experts, in the same part of the layer, and not inside of one."""
    return name.startswith(experts.rpartition(".")[0] + ".") and not name.startswith(experts + ".")
