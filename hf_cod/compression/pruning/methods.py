"""The table of pruning methods, the pruning of one layer, and the count of its zeros."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_cod.analysis.statistics.input_products import ProductsRecorder
from hf_cod.analysis.statistics.squares_recorder import StatisticsRecorder
from hf_cod.functional.sparsity import Pattern, magnitude_mask, sparsegpt, wanda_mask
from hf_cod.layers.sequential import Recorder, Sums
from hf_cod.layers.stack import DecoderLayers


@dataclass(frozen=True)
class Target:
    """The target of a layer's matrices: `sparsity`, the share of zeros, and optionally the N:M `pattern` (N, M)."""

    sparsity: float
    pattern: Pattern | None = None


@dataclass(frozen=True)
class Method:
    """A method that prunes one matrix.

    Attributes:
        prune: (W (out, in), the matrix's sum or None, target) -> the pruned W; W itself is not changed.
        recorder: makes the sums of some layers; None for a method that uses weights alone.
        takes_squares: whether the sums are those of `LayerStatistics`, so that saved statistics can be used.
    """

    prune: Callable[[Tensor, Tensor | None, Target], Tensor]
    recorder: Callable[[DecoderLayers, Sequence[int]], Recorder] | None = None
    takes_squares: bool = False


def _magnitude(W: Tensor, sums: Tensor | None, target: Target) -> Tensor:
    """Sets the smallest weights of each matrix to zero, regardless of the inputs."""
    return W.masked_fill(magnitude_mask(W, target.sparsity, target.pattern), 0)


def _wanda(W: Tensor, sums: Tensor | None, target: Target) -> Tensor:
    """Sets the weights of each row to zero whose product with the norm of their input is smallest."""
    assert sums is not None
    return W.masked_fill(wanda_mask(W, sums.sqrt().to(W.device), target.sparsity, target.pattern), 0)


def _sparsegpt(W: Tensor, sums: Tensor | None, target: Target) -> Tensor:
    """Prunes column by column with error compensation by the columns that follow."""
    assert sums is not None
    return sparsegpt(W, sums.to(W.device), target.sparsity, target.pattern)


METHODS = {
    "magnitude": Method(_magnitude),
    "wanda": Method(_wanda, StatisticsRecorder, takes_squares=True),
    "sparsegpt": Method(_sparsegpt, ProductsRecorder),
}


def check_pattern(stack: DecoderLayers, M: int) -> None:
    """Checks that each matrix has rows of a multiple of M weights.

    Raises:
        ValueError: a matrix has not; names it.
    """
    for index in range(len(stack)):
        for name, shape in stack.input_shapes(index).items():
            if shape[-1] % M:
                raise ValueError(f"pattern: expected rows of a multiple of {M} weights, got {shape[-1]} in {name}")


@torch.no_grad()
def prune_layer(
    stack: DecoderLayers, index: int, method: Method, sums: Sums | None, targets: Callable[[str, int | None], Target]
) -> list[str]:
    """Prunes all matrices of a layer in place.

    Args:
        stack: the layers.
        index: of the layer.
        method: how they are pruned.
        sums: of its inputs.
        targets: (name of a matrix, expert of a bank or None) -> its target.

    Returns:
        The matrices that no token entered; they are pruned by magnitude instead.
    """
    unseen = []
    for name, expert, W in _parts(stack, index):
        total = None if method.recorder is None or sums is None else sums.of(name, expert)
        chosen = method
        if method.recorder is not None and total is None:
            chosen = METHODS["magnitude"]
            unseen.append(name if expert is None else f"{name}.{expert}")
        pruned = chosen.prune(W, total, targets(name, expert))
        if not pruned.isfinite().all():
            raise ValueError(f"weights: expected finite numbers, got NaN or infinity in {name} after pruning")
        W.copy_(pruned)
    return unseen


def measure_sparsity(stack: DecoderLayers) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """Counts zeros, for a report's `layers` {"sparsity", "parameters"} and `results` {"sparsity", "module_sparsity"}.

    Each parameter of a bank of experts counts as one matrix. A layer without matrices has the sparsity None.
    """
    layers: dict[str, list[Any]] = {"sparsity": [], "parameters": []}
    modules: dict[str, float] = {}
    zeros = 0
    for index in range(len(stack)):
        counts = {name: (int((W == 0).sum()), W.numel()) for name, W in stack.matrices(index)}
        modules |= {name: zero / size for name, (zero, size) in counts.items()}
        here, size = (sum(count[k] for count in counts.values()) for k in (0, 1))
        layers["sparsity"].append(here / size if size else None)
        layers["parameters"].append(size)
        zeros += here
    return layers, {"sparsity": zeros / sum(layers["parameters"]), "module_sparsity": modules}


def measure_expert_sparsity(stack: DecoderLayers) -> dict[str, list[float | None]]:
    """Name of routed experts -> the share of zeros of each, in its matrices that are not excluded; None without any."""
    found: dict[str, list[float | None]] = {}
    for index in range(len(stack)):
        counts = {(name, expert): (int((W == 0).sum()), W.numel()) for name, expert, W in _parts(stack, index)}
        for experts in stack.expert_sets(index):
            if not experts.shared:
                own = [[counts[p] for p in experts.matrices_of(e) if p in counts] for e in range(experts.count)]
                sums = [(sum(zeros for zeros, _ in each), sum(size for _, size in each)) for each in own]
                found[experts.name] = [zeros / size if size else None for zeros, size in sums]
    return found


def _parts(stack: DecoderLayers, index: int) -> Iterator[tuple[str, int | None, Tensor]]:
    """(name, expert or None, W (out, in)); W is a view of the model's weights."""
    for name, W in stack.matrices(index):
        if W.dim() == 2:
            yield name, None, W
        else:
            yield from ((name, expert, W[expert]) for expert in range(len(W)))
