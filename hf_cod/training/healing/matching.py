"""Which layer of the teacher each layer of the student came from."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_cod.layers.stack import DecoderLayers

# Numbers of a weight that are compared.
SAMPLE = 4096


@dataclass(frozen=True)
class Matching:
    """Where the student's layers come from.

    Attributes:
        layers: for each layer of the student the teacher's.
        how: in words, how that was found.
    """

    layers: list[int]
    how: str


def match_layers(student: DecoderLayers, teacher: DecoderLayers, told: Sequence[int] | None = None) -> Matching:
    """Finds where the student's layers come from.

    What was told counts first, then the config of our own models, which keeps the old numbers of layers. Else weights
    tell: pruning, factorizing and narrowing leave norms as they are, and matrices near what they were, so that the
    teacher's layer with the nearest weights is the one. If these are not in rising order, the student's layers are
    spread evenly over the teacher's, the last one to the last one.

    Args:
        student: its layers.
        teacher: its layers, as many or more.
        told: for each layer of the student the teacher's, or None.

    Raises:
        ValueError: a student with more layers than the teacher; told layers that do not exist, or not in rising order.
    """
    mine, theirs = len(student), len(teacher)
    if mine > theirs:
        raise ValueError(f"student: expected at most the teacher's {theirs} layers, got {mine}")
    if told is not None:
        if len(told) != mine or not _rising(told) or not 0 <= told[0] <= told[-1] < theirs:
            raise ValueError(
                f"teacher_layers: expected {mine} of the teacher's layers 0..{theirs - 1} in rising order, got "
                f"{list(told)}"
            )
        return Matching(list(told), "as told")
    if mine == theirs:
        return Matching(list(range(mine)), "both have as many layers")
    recorded = _recorded(student, theirs)
    if recorded is not None:
        return Matching(recorded, "as the student's config tells")
    nearest = _nearest(student, teacher)
    if nearest is not None:
        return Matching(nearest, "by nearest weights")
    even = [round((index + 1) * theirs / mine) - 1 for index in range(mine)]
    return Matching(
        even, "spread evenly by depth, because neither config nor weights tell; --teacher-layers names them"
    )


def _recorded(student: DecoderLayers, depth: int) -> list[int] | None:
    """The old numbers of the layers, which our own models keep."""
    config: Any = student.config
    depths = getattr(config, "layer_depths", None)
    return list(depths) if depths and getattr(config, "original_num_hidden_layers", None) == depth else None


def _nearest(student: DecoderLayers, teacher: DecoderLayers) -> list[int] | None:
    """For each layer of the student the teacher's that is nearest; None if these are not in rising order."""
    theirs = [_samples(layer) for layer in teacher]
    found = []
    for layer in student:
        own = _samples(layer)
        distances = [_distance(own, other) for other in theirs]
        found.append(min(range(len(distances)), key=distances.__getitem__))
    return found if _rising(found) else None


def _samples(layer: torch.nn.Module) -> dict[str, Tensor]:
    """Name and shape -> the first numbers of each weight in floating point."""
    return {
        f"{name} {tuple(p.shape)}": p.detach().flatten()[:SAMPLE].float().cpu()
        for name, p in layer.named_parameters()
        if p.is_floating_point() and p.device.type != "meta"
    }


def _distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Mean over the weights that both have of ||a - b||^2 / (||a||^2 + ||b||^2)."""
    shared = [(a, other[key]) for key, a in one.items() if key in other]
    shares = [float((a - b).square().sum() / (a.square().sum() + b.square().sum()).clamp(min=1e-30)) for a, b in shared]
    return sum(shares) / len(shares) if shares else 1.0


def _rising(layers: Sequence[int]) -> bool:
    return all(a < b for a, b in itertools.pairwise(layers))
