"""Removes channels of the experts of a layer: each keeps equally many, chosen by its own statistics."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_cod.compression.width.matrices import check_finite
from hf_cod.compression.width.selection import Kept, Selection
from hf_cod.functional.depth import wide
from hf_cod.functional.products import output_energy
from hf_cod.layers.expert_units import ExpertUnits, kept_of_experts, set_experts, stored_of
from hf_cod.layers.sequential import Sums
from hf_cod.layers.stack import DecoderLayers
from hf_cod.layers.units import Changes


@torch.no_grad()
def cut_experts(
    stack: DecoderLayers, own: ExpertUnits, number: int, sums: Sums | None, select: Selection
) -> tuple[Changes, float | None, list[str]]:
    """Narrows the experts of a layer.

    Args:
        stack: the layers.
        own: the channels of the experts.
        number: how many each keeps.
        sums: of the inputs of the writers, of each expert's own tokens; None if they are not required.
        select: how channels are selected. A bank without biases gets none: its compensation "bias" is "none".

    Returns:
        The changed sizes; the lost share of the energy of the writers' outputs, in which experts count by their tokens,
        or None if it is not known; the names of writers that no token entered, the one of all of them alone.

    Raises:
        ValueError: NaN or infinity; the layer is left unchanged.
    """
    if lacks_bias(own) and select.compensation == "bias":
        select = Selection(select.method, "none", select.taylor)
    chosen, unseen, lost, energy = [], [], 0.0, 0.0
    for expert in range(own.experts):
        weights = own.weights_of(stack.model, expert)
        M = _sum_of(sums, own, expert)
        if sums is not None and M is None:
            unseen.append(f"{own.writer}.{expert}")
        kept = select(weights, own, number, M, unseen=sums is not None and M is None, expert=expert)
        if kept.error is not None and M is not None:
            before = output_energy(wide(weights[own.writer]).to(M), M[:-1, :-1])
            lost, energy = lost + kept.error * before, energy + before
        chosen.append(kept)
    if len(unseen) == own.experts:
        unseen = [own.writer]
    tensors = _tensors(stack, own, chosen)
    check_finite(tensors, "expert channels")
    changes = set_experts(stack.model, own, number, tensors)
    error = None if sums is None or unseen == [own.writer] else lost / energy if energy > 0 else 0.0
    return changes, error, unseen


def lacks_bias(own: ExpertUnits) -> bool:
    """Whether these are experts of a bank that has no place for biases of its outputs."""
    return not own.linears and own.writer not in own.biases


def _sum_of(sums: Sums | None, own: ExpertUnits, expert: int) -> Tensor | None:
    if sums is None:
        return None
    return sums.of(own.linears[own.writer][expert]) if own.linears else sums.of(own.writer, expert)


def _tensors(stack: DecoderLayers, own: ExpertUnits, chosen: list[Kept]) -> dict[str, Tensor]:
    """Name -> parameter of the narrowed experts."""
    tensors = kept_of_experts(stack.model, own, torch.stack([kept.units for kept in chosen]))
    writers = own.linears.get(own.writer)
    if writers is None:
        tensors[own.writer] = stored_of(stack.model, own, own.writer, None, [kept.W for kept in chosen])
        added = [kept.bias for kept in chosen]
        if own.writer in own.biases and any(b is not None for b in added):
            bias = tensors[f"{own.writer}_bias"]
            tensors[f"{own.writer}_bias"] = torch.stack(
                [before if b is None else before.to(b) + b for before, b in zip(bias, added, strict=True)]
            )
        return tensors
    for expert, (linear, kept) in enumerate(zip(writers, chosen, strict=True)):
        tensors[f"{linear}.weight"] = stored_of(stack.model, own, own.writer, expert, [kept.W])
        if kept.bias is not None:
            before = tensors.get(f"{linear}.bias")
            tensors[f"{linear}.bias"] = kept.bias if before is None else before.to(kept.bias) + kept.bias
    return tensors
