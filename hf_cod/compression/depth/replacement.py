"""Replaces a removed block of layers by a linear map, folded into the last matrix before it, without new modules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from hf_cod.analysis.statistics.matrix_inputs import padding_of, real_rows
from hf_cod.functional.depth import wide
from hf_cod.functional.linear_map import DAMPING, MapSums, fold
from hf_cod.io.text import Batch
from hf_cod.layers.checks import is_pruned
from hf_cod.layers.devices import execution_device, to_device
from hf_cod.layers.direct_use import has_tokens_first
from hf_cod.layers.orientation import is_plain, turned
from hf_cod.layers.partial_forward import State, layer_states, run_layer
from hf_cod.layers.running import evaluation_mode
from hf_cod.layers.stack import DecoderLayers
from hf_cod.layers.task import model_inputs

# Tolerance, as a share of a change of the matrix's output, of the test that it is added to the layer's output.
ADDED_WITHIN = 0.05


@dataclass(frozen=True)
class Block:
    """Consecutive layers to remove, from `first` to `last`, counted from 0."""

    first: int
    last: int

    def __str__(self) -> str:
        return f"layer {self.first}" if self.first == self.last else f"layers {self.first} to {self.last}"


def blocks_of(layers: Sequence[int]) -> list[Block]:
    """The runs of consecutive layers among ascending ones."""
    starts = [layers[0], *(b for a, b in pairwise(layers) if b > a + 1)]
    ends = [*(a for a, b in pairwise(layers) if b > a + 1), layers[-1]]
    return [Block(*ends) for ends in zip(starts, ends, strict=True)]


class BlockReplacer:
    """Fits maps to the removed blocks of a model, from the first to the last.

    The target of a map is the intact model's hidden state after the block. Its input is the hidden state of the
    shortened model before the block, with the previous maps, so it also compensates the errors of previous removals.

    In addition to the model, memory holds the hidden states after the blocks, and one more, of each batch on the CPU.

    Args:
        stack: the layers of a model whose weights can be changed.
        removed: the layers to remove, in ascending order; they must still be there.
        batches: dicts for the model's forward; attention_mask (S, T) marks padding, which does not count.
        damping: see `MapSums.solve`.
    """

    def __init__(
        self, stack: DecoderLayers, removed: Sequence[int], batches: Sequence[Batch], damping: float = DAMPING
    ) -> None:
        self._stack, self._damping = stack, damping
        device = execution_device(stack.model)
        self._batches = [to_device(batch, device) for batch in batches]
        self.blocks = blocks_of(removed)
        self._at = 0  # the next layer of the shortened model to run
        self._behind: dict[int, list[Tensor]] = {block.last: [] for block in self.blocks}
        self._before: list[State] = []
        self._run_intact()

    @torch.no_grad()
    def _run_intact(self) -> None:
        with evaluation_mode(self._stack):
            for batch in self._batches:
                with layer_states(self._stack) as states:
                    self._stack.trunk(**model_inputs(self._stack.model, batch))
                for last, kept in self._behind.items():
                    kept.append(states[last + 1][0].cpu())
                self._before.append((states[0][0].cpu(), states[0][1]))

    @torch.no_grad()
    def fit(self, block: Block) -> tuple[nn.Module, str, Tensor, float]:
        """Fits the map of the next block, without changing the model.

        Returns:
            The matrix into which it can be folded, its name, the map, and the share of the change that it explains.

        Raises:
            ValueError: there is no such matrix; says why.
        """
        if block.first == 0:
            raise ValueError("there is no layer before it")
        front = block.first - 1
        with evaluation_mode(self._stack):
            self._advance(front)
            inputs = model_inputs(self._stack.model, self._batches[0])
            name, matrix = added_matrix(self._stack, front, inputs, self._before[0])
            sums = MapSums()
            for batch, before, wanted in zip(self._batches, self._before, self._behind[block.last], strict=True):
                with _outputs_of(matrix) as added:
                    hidden, _ = run_layer(self._stack, front, model_inputs(self._stack.model, batch), before)
                mask = padding_of(self._stack.mask(model_inputs(self._stack.model, batch)))
                square = mask is not None and has_tokens_first(self._stack, *mask.shape)
                # Widened first, so that bf16 does not round the difference.
                r = wide(wanted.to(hidden.device)) - wide(hidden)
                y = added[-1].reshape(hidden.shape)
                sums.add(*(real_rows(x, mask, square, f"layer {front}") for x in (y, r)))
        return matrix, name, *sums.solve(self._damping)

    @torch.no_grad()
    def skip(self, block: Block) -> None:
        """Continues after a block, with the current contents of the model."""
        with evaluation_mode(self._stack):
            self._advance(block.first)
        self._at = block.last + 1

    def _advance(self, layer: int) -> None:
        """Runs the shortened model up to the input of `layer`."""
        for index in range(self._at, layer):
            for number, batch in enumerate(self._batches):
                inputs = model_inputs(self._stack.model, batch)
                hidden, rest = run_layer(self._stack, index, inputs, self._before[number])
                self._before[number] = (hidden.cpu(), rest)
        self._at = max(self._at, layer)


def contents(matrix: nn.Module) -> dict[str, Tensor]:
    """A copy of a matrix's parameters, for `put_back`."""
    return {name: p.detach().clone() for name, p in matrix.named_parameters(recurse=False)}


@torch.no_grad()
def put_in(matrix: Any, T: Tensor) -> None:
    """Folds a map into a Linear or Conv1D, in place."""
    matrix.weight.copy_(turned(matrix, fold(turned(matrix, matrix.weight), T)))
    if matrix.bias is not None:
        matrix.bias.copy_(fold(matrix.bias[:, None], T)[:, 0])


@torch.no_grad()
def put_back(matrix: nn.Module, before: dict[str, Tensor]) -> None:
    """Restores the parameters of a matrix."""
    for name, p in matrix.named_parameters(recurse=False):
        p.copy_(before[name])


def added_matrix(
    stack: DecoderLayers, layer: int, inputs: dict[str, Any], before: State | None
) -> tuple[str, nn.Module]:
    """The last matrix of a layer, if its output is added unchanged to the layer's output.

    This is tested by running the layer: a change d of the matrix's output must change the layer's output by d. It holds
    for the last matrix of the MLP (or of a shared expert) in Pre-LN families, but not if a norm follows (Post-LN,
    sandwich norms), and not for banks of experts, which are not a single matrix. Pruned matrices are excluded, because
    a map would fill their zeros.

    Raises:
        ValueError: there is none; says why.
    """
    called: list[str] = []
    linears = stack.linears(layer)
    handles = [m.register_forward_hook(lambda *_, name=name: called.append(name)) for name, m in linears.items()]
    try:
        hidden, _ = run_layer(stack, layer, inputs, before)
    finally:
        for handle in handles:
            handle.remove()
    if not called:
        raise ValueError(f"layer {layer} has no single matrix to fold into")
    matrix: Any = linears[called[-1]]
    if not is_plain(matrix) or called.count(called[-1]) != 1:
        raise ValueError(f"the last matrix of layer {layer}, {called[-1]}, is not a plain one that runs once a token")
    if is_pruned(matrix.weight):
        raise ValueError(f"a map would fill the zeros of {called[-1]} of layer {layer}, which is pruned")
    d = hidden if hidden.any() else torch.ones_like(hidden)
    handle = matrix.register_forward_hook(
        lambda module, args, output: output + d.view_as(output) if output.numel() == d.numel() else output
    )
    try:
        changed, _ = run_layer(stack, layer, inputs, before)
    finally:
        handle.remove()
    error = (wide(changed) - wide(hidden) - wide(d)).norm()  # float16 would overflow to infinity
    if not float(error) <= ADDED_WITHIN * float(wide(d).norm()):
        why = "experts follow it" if stack.experts(layer) else "for example because a norm or a gate follows it"
        raise ValueError(
            f"the output of {called[-1]} of layer {layer} is not added unchanged to the hidden state, {why}"
        )
    return called[-1], matrix


@contextmanager
def _outputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collects the outputs of the module in a list."""
    outputs: list[Tensor] = []
    handle = module.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()
