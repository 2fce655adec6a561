"""Ranks from spectra: what each matrix would lose, measured in one pass, decides where the budget goes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from hf_cod.calibration import Batch
from hf_cod.decoder_layers import DecoderLayers, find_decoder_layers
from hf_cod.diagnostics.partial_pass import check_independent
from hf_cod.functional.factorization import spectrum
from hf_cod.functional.ranks import ranks_of_spectra
from hf_cod.layer_by_layer import FinishedLayers, Sums, change_sequentially, fingerprint_of_work
from hf_cod.low_rank.rank_plan import RankPlan, factorizable, least_weights
from hf_cod.statistics.input_products import ProductsRecorder
from hf_cod.writable_weights import check_writable

# Of matrices that no energy leaves.
TINY = torch.finfo(torch.float64).tiny


def plan_ranks(
    model: nn.Module,
    parameters: float,
    *,
    batches: Sequence[Batch] | None = None,
    journal: str | Path | None = None,
    path: str | None = None,
    show_progress: bool = False,
) -> RankPlan:
    """Distributes a budget of parameters over all matrices by their spectra: each loses as little of its output as the
    others allow (`functional.ranks.ranks_of_spectra`).

    Args:
        model: a transformers model with plain weights; it is left as it was.
        parameters: share of the weights of the layers' matrices to keep, in 0..1.
        batches: with them spectra are those of the outputs on this text (whitened), else those of the weights.
        journal: a directory: finished layers go there, and the same call goes on where it stopped.
        path: the stack's module name where it cannot be found.
        show_progress: show a progress bar.

    Raises:
        ValueError: a budget out of reach (says the least possible), or weights or activations that are not finite.
    """
    stack = find_decoder_layers(model, path)
    total = sum(stack.count_weights(index) for index in range(len(stack)))
    least = sum(least_weights(stack, index) for index in range(len(stack)))
    if not least <= parameters * total <= total:
        raise ValueError(
            f"parameters: expected a share in {math.ceil(1e4 * least / total) / 1e4:g}..1 (the least is rank 1 "
            f"wherever that saves), got {parameters}"
        )
    shapes = {name: shape for index in range(len(stack)) for name, shape in factorizable(stack, index).items()}
    fixed = total - sum(m * n for m, n in shapes.values())
    spectra = _spectra(stack, batches, journal, show_progress)
    lost = [e / max(float(e.sum()), TINY) for e in (spectra[name] for name in shapes)]
    found = ranks_of_spectra(list(shapes.values()), lost, int(parameters * total) - fixed)
    ranks = {name: rank for name, rank in zip(shapes, found, strict=True) if rank is not None}
    return RankPlan("parameters", parameters, ranks, "spectrum")


@torch.no_grad()
def _spectra(
    stack: DecoderLayers, batches: Sequence[Batch] | None, journal: str | Path | None, show_progress: bool
) -> dict[str, Tensor]:
    """Name -> spectrum of each matrix that can be factorized; sums of one layer at a time are in memory."""
    check_writable(stack)
    found: dict[str, Tensor] = {}

    def measure(index: int, sums: Sums | None) -> None:
        matrices = dict(stack.matrices(index))
        for name in factorizable(stack, index):
            H = None if sums is None else sums.of(name)
            found[name] = spectrum(matrices[name], H).cpu()

    if not batches:
        for index in range(len(stack)):
            measure(index, None)
        return found
    check_independent(stack, "factorize")
    finished = FinishedLayers(
        journal,
        fingerprint_of_work(journal, stack.model, batches, "spectra"),
        lambda index: {name: found[name] for name in factorizable(stack, index)},
        lambda index, tensors: found.update(tensors),
    )
    change_sequentially(stack, batches, ProductsRecorder, measure, finished, "spectra", show_progress)
    return found
