"""Ranks from spectra: the loss of each matrix at each rank, measured in one pass, distributes the budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from hf_cod.analysis.statistics.input_products import ProductsRecorder
from hf_cod.analysis.statistics.output_gradients import measure_loss_weights
from hf_cod.compression.low_rank.experts import bank_matrices, check_basis, moments_of
from hf_cod.compression.low_rank.rank_plan import RankPlan, experts_told, factorizable, least_weights
from hf_cod.compression.low_rank.settings import RankFields, RankSettings
from hf_cod.functional.factorization import spectrum
from hf_cod.functional.ranks import count, full_rank, ranks_of_spectra
from hf_cod.io.arguments import checked
from hf_cod.io.deprecation import renamed
from hf_cod.io.quantized import check_unquantized
from hf_cod.io.settings import SampleSettings, resolve
from hf_cod.io.text import Batch, Batches, Texts, Tokenizer, split_samples
from hf_cod.layers.batches import batches_of, check_needed
from hf_cod.layers.checks import check_writable, name_of, sizes_of
from hf_cod.layers.finished_layers import FinishedLayers, fingerprint_of_work
from hf_cod.layers.inputs import check_inputs
from hf_cod.layers.layer_notes import check_no_note
from hf_cod.layers.module_choice import choose_modules
from hf_cod.layers.sequential import measure_sequentially
from hf_cod.layers.stack import DecoderLayers, find_decoder_layers
from hf_cod.layers.task import LANGUAGE_MODELS, task_of

# Avoids a division by zero for matrices whose outputs are all zero.
TINY = torch.finfo(torch.float64).tiny

# Number of samples on which the gradients of the loss are measured.
GRADIENT_SAMPLES = 16


@renamed(path="layers_path", parameters="parameter_share")
@checked
def plan_ranks(
    model: nn.Module,
    parameter_share: float,
    method: str | None = None,
    *,
    batches: Batches | None = None,
    tokenizer: Tokenizer = None,
    texts: Texts | None = None,
    journal: str | Path | None = None,
    layers_path: str | None = None,
    show_progress: bool = False,
    settings: RankSettings | None = None,
    samples: SampleSettings | None = None,
    **fields: Unpack[RankFields],
) -> RankPlan:
    """Distributes a budget of parameters over all matrices by their spectra, with the least sum of losses
    (`functional.ranks.ranks_of_spectra`).

    | method | loss that is summed over matrices | requires |
    |---|---|---|
    | fisher | lost share of the outputs' energy, times the cost of losing all of it | batches and a loss |
    | spectrum | lost share of the outputs' energy (without batches, of the weights'), equally weighted | nothing |

    The costs of fisher are from `statistics.output_gradients`; a matrix whose cost is not known there has the mean of
    its layer. The matrices of a bank of experts have one rank for all experts, and the sum of their spectra.

    Args:
        model: a transformers model with plain weights; it is not changed.
        parameter_share: share of the weights of the layers' matrices to keep, in 0..1.
        method: see the table; default: fisher with batches of a language model, else spectrum.
        batches: dicts for the model's forward; `token_batches` makes them from texts. With batches, spectra of the
            outputs on them (whitened) are used, else spectra of the weights.
        tokenizer: with `texts`, instead of `batches`: the model's tokenizer.
        texts: text, list of texts, `datasets` column, or any iterable of strings; `token_batches` cuts them.
        samples: how texts are cut into samples; default: `SampleSettings()`.
        journal: a directory to which each finished layer is saved; the same call resumes from it.
        layers_path: module name of the layer stack, if it cannot be found automatically.
        show_progress: show a progress bar.
        settings: how ranks are distributed over matrices.
        **fields: or fields of `RankSettings` by name: `expert_basis`, as `factorize` has it; `include` and `exclude`,
            the matrices to factorize, as PEFT's target_modules and exclude_modules; for texts, also fields of
            `SampleSettings`: sequence_length, max_samples, batch_size, pack, seed.

    Raises:
        ValueError: quantized or packed weights, an unknown method, fisher without a loss, a budget out of range (says
            the least possible), or weights or activations that are not finite.
    """
    how = resolve(plan_ranks, RankSettings, settings, fields, method=method)
    method, basis = how.method, how.expert_basis
    stack = choose_modules(find_decoder_layers(model, layers_path), how).stack
    check_unquantized(stack.model, name_of(stack))
    check_basis(stack, basis)
    batches = batches_of(model, batches, tokenizer, texts, samples, fields)
    if method == "fisher":
        check_needed(batches, "for fisher")
    if batches:
        check_inputs(stack.model, batches)
    total = sum(sizes_of(stack))
    least = sum(least_weights(stack, index, basis) for index in range(len(stack)))
    if not least <= parameter_share * total <= total:
        raise ValueError(
            f"parameter_share: expected a share in {math.ceil(1e4 * least / total) / 1e4:g}..1 (the least is rank 1 "
            f"wherever that is smaller{experts_told(stack)}), got {parameter_share}"
        )
    shapes = {name: shape for index in range(len(stack)) for name, shape in factorizable(stack, index, basis).items()}
    fixed = total - sum(count(shape, None) for shape in shapes.values())
    if method is None:
        method = "fisher" if batches and task_of(stack.model, batches) in LANGUAGE_MODELS else "spectrum"
    weights = dict.fromkeys(shapes, 1.0)
    if method == "fisher" and batches:
        few, _ = split_samples(batches, GRADIENT_SAMPLES)
        weights = _completed(stack, measure_loss_weights(stack, few, show_progress=show_progress))
    spectra = _spectra(stack, basis, batches, journal, show_progress)
    lost = [weights[name] * spectra[name] / max(float(spectra[name].sum()), TINY) for name in shapes]
    found = ranks_of_spectra(list(shapes.values()), lost, int(parameter_share * total) - fixed)
    ranks = {name: rank for name, rank in zip(shapes, found, strict=True) if rank is not None}
    made_for = (name_of(stack), sizes_of(stack), basis)
    return RankPlan("parameter_share", parameter_share, ranks, method, {}, *made_for)


def _completed(stack: DecoderLayers, costs: Mapping[str, float]) -> dict[str, float]:
    """The costs, with the mean of the layer for a matrix that has none."""
    found: dict[str, float] = {}
    for index in range(len(stack)):
        names = [*stack.linears(index), *(matrix.name for matrix in stack.expert_matrices(index))]
        known = [costs[name] for name in names if name in costs]
        mean = sum(known) / len(known) if known else 0.0
        found |= {name: costs.get(name, mean) for name in names}
    return found


@torch.no_grad()
def _spectra(
    stack: DecoderLayers, basis: str, batches: Sequence[Batch] | None, journal: str | Path | None, show_progress: bool
) -> dict[str, Tensor]:
    """Name -> spectrum of each factorizable matrix; memory holds the sums of one layer at a time."""
    check_writable(stack)
    found: dict[str, Tensor] = {}

    def measure(index: int, sums: Any) -> None:
        matrices, banks = dict(stack.matrices(index)), bank_matrices(stack, index, basis)
        for name in factorizable(stack, index, basis):
            if name in banks:
                found[name] = banks[name].spectrum(matrices[name], moments_of(banks[name], sums)).cpu()
            else:
                found[name] = spectrum(matrices[name], None if sums is None else sums.of(name)).cpu()

    if not batches:
        for index in range(len(stack)):
            measure(index, None)
        return found

    def put_back(index: int, tensors: dict[str, Tensor]) -> None:
        shapes = {name: (full_rank(shape),) for name, shape in factorizable(stack, index, basis).items()}
        for name in sorted(shapes.keys() | tensors.keys()):
            values, shape = tensors.get(name), shapes.get(name)
            if values is None or tuple(values.shape) != shape or not values.is_floating_point() or values.min() < 0:
                raise ValueError(f"{name}: expected squares of singular values of shape {shape}, got others")
        found.update(tensors)

    finished = FinishedLayers(
        journal,
        fingerprint_of_work(journal, stack.model, batches, "spectra", *_identity(stack, basis)),
        lambda index: {name: found[name] for name in factorizable(stack, index, basis)},
        put_back,
        lambda index, note: check_no_note(note),
    )
    measure_sequentially(stack, batches, ProductsRecorder, measure, finished, "spectra", show_progress)
    return found


def _identity(stack: DecoderLayers, basis: str) -> list[Any]:
    """What distinguishes spectra of chosen matrices from those of all, and those of banks of experts."""
    banked = any(stack.expert_matrices(index) for index in range(len(stack)))
    return [*([sorted(stack.excluded)] if stack.excluded else []), *([basis] if banked else [])]
