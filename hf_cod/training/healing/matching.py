"""Matches each layer of the student to a layer of the teacher."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_cod.layers.stack import DecoderLayers

# Number of elements per weight that are compared.
SAMPLE = 4096


@dataclass(frozen=True)
class Matching:
    """The teacher's layer for each layer of the student.

    Attributes:
        layers: for each layer of the student, the index of the teacher's layer.
        how: how the layers were matched, in words.
    """

    layers: list[int]
    how: str


def match_layers(student: DecoderLayers, teacher: DecoderLayers, given: Sequence[int] | None = None) -> Matching:
    """Matches each layer of the student to a layer of the teacher.

    The first of these that applies is used:

    1. `given`.
    2. Both models have the same number of layers: one to one.
    3. The student's config: models of this package record the original indices of their layers.
    4. The nearest weights: pruning, factorizing and narrowing keep norms and change matrices little, so the teacher's
       layer with the nearest weights is taken, if the result is in ascending order.
    5. Even spread: the student's layers are spread evenly over the teacher's, the last one matched to the last one.

    Args:
        student: the student's layers.
        teacher: the teacher's layers, at least as many.
        given: for each layer of the student, the index of the teacher's layer, or None.

    Raises:
        ValueError: a student with more layers than the teacher; indices in `given` that do not exist, or that are not
            in ascending order.
    """
    mine, theirs = len(student), len(teacher)
    if mine > theirs:
        raise ValueError(f"student: expected at most the teacher's {theirs} layers, got {mine}")
    if given is not None:
        if len(given) != mine or not _rising(given) or not 0 <= given[0] <= given[-1] < theirs:
            raise ValueError(
                f"teacher_layers: expected {mine} of the teacher's layers 0..{theirs - 1} in ascending order, got "
                f"{list(given)}"
            )
        return Matching(list(given), "as set by teacher_layers")
    if mine == theirs:
        return Matching(list(range(mine)), "one to one, because both models have the same number of layers")
    recorded = _recorded(student, theirs)
    if recorded is not None:
        return Matching(recorded, "by the student's config")
    nearest = _nearest(student, teacher)
    if nearest is not None:
        return Matching(nearest, "by nearest weights")
    even = [round((index + 1) * theirs / mine) - 1 for index in range(mine)]
    return Matching(
        even, "evenly by depth, because neither config nor weights determine them; set them with --teacher-layers"
    )


def _recorded(student: DecoderLayers, depth: int) -> list[int] | None:
    """The original indices of the layers, which the configs of this package's own models record; else None."""
    config: Any = student.config
    depths = getattr(config, "layer_depths", None)
    return list(depths) if depths and getattr(config, "original_num_hidden_layers", None) == depth else None


def _nearest(student: DecoderLayers, teacher: DecoderLayers) -> list[int] | None:
    """For each layer of the student, the teacher's nearest layer; None if these are not in ascending order."""
    theirs = [_samples(layer) for layer in teacher]
    found = []
    for layer in student:
        own = _samples(layer)
        distances = [_distance(own, other) for other in theirs]
        found.append(min(range(len(distances)), key=distances.__getitem__))
    return found if _rising(found) else None


def _samples(layer: torch.nn.Module) -> dict[str, Tensor]:
    """Name and shape -> the first elements of each floating-point weight."""
    return {
        f"{name} {tuple(p.shape)}": p.detach().flatten()[:SAMPLE].float().cpu()
        for name, p in layer.named_parameters()
        if p.is_floating_point() and p.device.type != "meta"
    }


def _distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """||a - b||^2 / (||a||^2 + ||b||^2), mean over the weights that both have."""
    shared = [(a, other[key]) for key, a in one.items() if key in other]
    shares = [float((a - b).square().sum() / (a.square().sum() + b.square().sum()).clamp(min=1e-30)) for a, b in shared]
    return sum(shares) / len(shares) if shares else 1.0


def _rising(layers: Sequence[int]) -> bool:
    return all(a < b for a, b in itertools.pairwise(layers))
