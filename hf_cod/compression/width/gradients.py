"""First-order importance of each head and channel for the loss of the intact model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from hf_cod.analysis.diagnostics.gradients import gradient_norms
from hf_cod.functional.channels import per_unit
from hf_cod.io.text import Batch
from hf_cod.layers.expert_units import ExpertUnits
from hf_cod.layers.experts import ExpertMatrix
from hf_cod.layers.orientation import turned
from hf_cod.layers.stack import DecoderLayers
from hf_cod.layers.units import LayerUnits, Units

Importance = dict[str, Tensor]
"""Name of the writer of units (see `Units`) -> (count,) importance of the units; (experts, count) for experts."""

Add = Callable[[Tensor], None]
"""Adds what the products (of a weight with its gradient, as it is stored) say about its units to their sums."""


def measure_taylor(
    stack: DecoderLayers, units: Sequence[LayerUnits], batches: Sequence[Batch], show_progress: bool
) -> Importance:
    """The first-order change of a batch's loss if a unit's weights are removed; absolute values, mean over batches.

        I_u = 1/B sum_b | sum_{w in u} w dL_b/dw |

    LLM-Pruner (Ma et al. 2023, arXiv 2305.11627, "vector-wise") sums the absolute values of each matrix's part, with
    one gradient of all samples. Here, the parts of a unit are summed with their signs, like the linear term of the
    loss, and absolute values are taken for each batch, because gradients of different samples cancel out where the loss
    is low (as in Michel et al. 2019, arXiv 1905.10650, for heads). Biases are ignored. Each batch takes one backward
    pass; each gradient is freed after it is read.

    Raises:
        ValueError: see `measure_gradient_norm`.
    """
    all_units = [own for layer in units for own in layer.found]
    sums = {own.writer: torch.zeros(*_experts(own), own.count, dtype=torch.float64) for own in all_units}
    adders = _adders(stack, all_units, sums)
    total = {writer: torch.zeros_like(values) for writer, values in sums.items()}

    def read(p: Tensor) -> None:
        if id(p) in adders and p.grad is not None:
            adders[id(p)](p.detach().double() * p.grad.double())

    measured = 0
    for _ in gradient_norms(stack, batches, "taylor", show_progress, read):
        measured += 1
        for writer, values in sums.items():
            total[writer] += values.abs()
            values.zero_()
    return {writer: values / measured for writer, values in total.items()}


def _experts(own: Units) -> tuple[int, ...]:
    return (own.experts,) if isinstance(own, ExpertUnits) else ()


def _adders(stack: DecoderLayers, units: Sequence[Units], sums: Importance) -> dict[int, Add]:
    """id of a weight -> what adds its products to the sums of its units."""
    found: dict[int, Add] = {}
    for own in units:
        total = sums[own.writer]
        for name, rows in (*own.readers.items(), (own.writer, own.columns)):
            dim = 0 if name == own.writer else 1  # of (out, in), the one that is summed
            if not isinstance(own, ExpertUnits):
                module = stack.model.get_submodule(name)
                found[id(module.weight)] = partial(_add, module, rows, dim, total)
                continue
            matrix = own.matrix(stack.model, name)
            if isinstance(matrix, ExpertMatrix):
                found[id(matrix.parameter)] = partial(_add_experts, matrix, rows, dim, total)
                continue
            for expert, module in enumerate(matrix.linears.values()):
                found[id(module.weight)] = partial(_add, module, rows, dim, total[expert])
    return found


def _add(module: nn.Module, rows: Tensor, dim: int, total: Tensor, products: Tensor) -> None:
    total += per_unit([(turned(module, products).sum(dim).cpu(), rows)], len(total))


def _add_experts(matrix: ExpertMatrix, rows: Tensor, dim: int, total: Tensor, products: Tensor) -> None:
    for expert, own in enumerate(matrix.matrices_of(products).sum(1 + dim).cpu()):
        total[expert] += per_unit([(own, rows)], total.shape[1])
