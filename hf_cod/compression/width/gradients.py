"""First-order importance of each head and channel for the loss of the intact model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_cod.analysis.diagnostics.gradients import gradient_norms
from hf_cod.functional.channels import per_unit
from hf_cod.io.text import Batch
from hf_cod.layers.orientation import is_transposed
from hf_cod.layers.stack import DecoderLayers
from hf_cod.layers.units import LayerUnits, Units

Importance = dict[str, Tensor]
"""Name of the writer of units (see `Units`) -> (count,) importance of the units."""


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
    owners = _owners(stack, units)
    all_units = [own for layer in units for own in layer.found]
    sums = {own.writer: torch.zeros(own.count, dtype=torch.float64) for own in all_units}
    total = {writer: torch.zeros_like(values) for writer, values in sums.items()}

    def read(p: Tensor) -> None:
        if id(p) in owners:
            own, units_of, along_rows = owners[id(p)]
            assert p.grad is not None
            products = (p.detach().double() * p.grad.double()).sum(1 if along_rows else 0).cpu()
            sums[own.writer] += per_unit([(products, units_of)], own.count)

    measured = 0
    for _ in gradient_norms(stack, batches, "taylor", show_progress, read):
        measured += 1
        for writer, values in sums.items():
            total[writer] += values.abs()
            values.zero_()
    return {writer: values / measured for writer, values in total.items()}


def _owners(stack: DecoderLayers, units: Sequence[LayerUnits]) -> dict[int, tuple[Units, Tensor, bool]]:
    """id of a weight -> its units, that of each row (column of the writer), whether these are rows as it is stored."""
    owners = {}
    for own in (own for layer in units for own in layer.found):
        for name, rows in (*own.readers.items(), (own.writer, own.columns)):
            module = stack.model.get_submodule(name)
            owners[id(module.weight)] = own, rows, (name != own.writer) != is_transposed(module)
    return owners
