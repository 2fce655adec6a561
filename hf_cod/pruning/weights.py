"""The matrices of a layer as pruning writes them: pruning them, counting their zeros."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hf_cod.decoder_layers import DecoderLayers
from hf_cod.layer_by_layer import Sums
from hf_cod.pruning.magnitude import MAGNITUDE
from hf_cod.pruning.method import Method, Target


def check_pattern(stack: DecoderLayers, M: int) -> None:
    """Makes sure that each matrix's rows are whole groups of M.

    Raises:
        ValueError: one is not; says which.
    """
    for index in range(len(stack)):
        for name, shape in stack.input_shapes(index).items():
            if shape[-1] % M:
                raise ValueError(f"pattern: expected rows of a multiple of {M} weights, got {shape[-1]} in {name}")


@torch.no_grad()
def prune_layer(stack: DecoderLayers, index: int, method: Method, sums: Sums | None, target: Target) -> list[str]:
    """Prunes all matrices of a layer in place.

    Returns:
        The matrices that no token entered, which were pruned by magnitude instead.
    """
    unseen = []
    for name, expert, W in _parts(stack, index):
        total = None if method.recorder is None or sums is None else sums.of(name, expert)
        chosen = method
        if method.recorder is not None and total is None:
            chosen = MAGNITUDE
            unseen.append(name if expert is None else f"{name}.{expert}")
        pruned = chosen.prune(W, total, target)
        if not pruned.isfinite().all():
            raise ValueError(f"weights: expected finite numbers, got NaN or infinity in {name} after pruning")
        W.copy_(pruned)
    return unseen


def measure_sparsity(stack: DecoderLayers) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """Counts zeros: as a report's `layers` {"sparsity", "parameters"} and `results` {"sparsity", "modules"}.

    A bank of experts counts as one matrix for each of its parameters.
    """
    layers: dict[str, list[Any]] = {"sparsity": [], "parameters": []}
    modules: dict[str, float] = {}
    zeros = 0
    for index in range(len(stack)):
        counts = {name: (int((W == 0).sum()), W.numel()) for name, W in stack.matrices(index)}
        modules |= {name: zero / size for name, (zero, size) in counts.items()}
        here, size = (sum(column) for column in zip(*counts.values(), strict=True))
        layers["sparsity"].append(here / size)
        layers["parameters"].append(size)
        zeros += here
    return layers, {"sparsity": zeros / sum(layers["parameters"]), "modules": modules}


def _parts(stack: DecoderLayers, index: int) -> Iterator[tuple[str, int | None, Tensor]]:
    """(name, expert or None, W (out, in)): views of the model's own weights."""
    for name, W in stack.matrices(index):
        if W.dim() == 2:
            yield name, None, W
        else:
            yield from ((name, expert, W[expert]) for expert in range(len(W)))
