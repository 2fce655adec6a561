"""What each head and channel of the intact model is worth to its loss, to first order."""

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
"""Name of a writing matrix -> (count,) importance of its units."""


def measure_taylor(
    stack: DecoderLayers, units: Sequence[LayerUnits], batches: Sequence[Batch], show_progress: bool
) -> Importance:
    """How much a batch's loss would change, to first order, if a unit's weights went; mean over batches.

        I_u = 1/B sum_b | sum_{w in u} w dL_b/dw |

    LLM-Pruner (Ma et al. 2023, arXiv 2305.11627, "vector-wise") takes the absolute value of each matrix's part and adds
    those up, with the gradient of all samples together. Here a unit's matrices are added with their signs, as the
    linear term of the loss is, and absolute values are taken batch by batch, because gradients of different samples
    cancel out where the loss is low (Michel et al. 2019, arXiv 1905.10650, do so for heads). Biases do not count. One
    backward pass a batch; no gradient outlives its reading.

    Raises:
        ValueError: as `measure_gradient_norm` does.
    """
    owners = _owners(stack, units)
    all_units = [own for layer in units for own in layer.found]
    sums = {own.writer: torch.zeros(own.count, dtype=torch.float64) for own in all_units}
    total = {writer: torch.zeros_like(values) for writer, values in sums.items()}

    def read(p: Tensor) -> None:
        if id(p) in owners:
            own, parts, along_rows = owners[id(p)]
            assert p.grad is not None
            products = (p.detach().double() * p.grad.double()).sum(1 if along_rows else 0).cpu()
            nothing = torch.zeros(own.count, dtype=torch.float64)
            rows, columns = ([(products, parts)], nothing) if parts else ([], products)
            sums[own.writer] += per_unit(rows, columns, own.count)

    measured = 0
    for _ in gradient_norms(stack, batches, "taylor", show_progress, read):
        measured += 1
        for writer, values in sums.items():
            total[writer] += values.abs()
            values.zero_()
    return {writer: values / measured for writer, values in total.items()}


def _owners(stack: DecoderLayers, units: Sequence[LayerUnits]) -> dict[int, tuple[Units, int, bool]]:
    """id of a weight -> its units, its parts (0: it writes), and whether units own rows of it as it is stored."""
    owners = {}
    for own in (own for layer in units for own in layer.found):
        for name, parts in (*own.readers.items(), (own.writer, 0)):
            module = stack.model.get_submodule(name)
            owners[id(module.weight)] = own, parts, bool(parts) != is_transposed(module)
    return owners
