"""NamedNumbers: what a reader finds in a file, and the matrices of a model that its names stand for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_cod.io.schema import brief
from hf_cod.layers.stack import DecoderLayers


@dataclass(frozen=True)
class NamedNumbers:
    """Numbers by module.

    Attributes:
        source: the format, which becomes the method of scores and plans.
        values: name of a matrix, or of a module that contains some, such as a layer -> number.
        rest: the number of matrices without a name; None: there must be none.
        bits: whether the numbers are bits; None: the file does not say what they are.
    """

    source: str
    values: dict[str, float]
    rest: float | None = None
    bits: bool | None = None


def number_of(value: Any, name: str) -> float:
    """A finite number.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {brief(value)}")
    return float(value)


def bits_of(settings: Any, name: str) -> float:
    """The entry "bits" of the settings of a module.

    Raises:
        ValueError: there is none, or it is not positive.
    """
    if not isinstance(settings, Mapping) or "bits" not in settings:
        raise ValueError(f"{name}: expected settings with bits, got {brief(settings)}")
    bits = number_of(settings["bits"], f"{name}: bits")
    if bits <= 0:
        raise ValueError(f"{name}: expected bits above 0, got {bits:g}")
    return bits


def by_matrix(found: NamedNumbers, stack: DecoderLayers, field: str) -> tuple[dict[str, float], list[str]]:
    """The number of each matrix of the layers, in the order of the model, and names of other modules of the model.

    A name stands for the matrix, or for all matrices inside of the module; the longest name applies.

    Raises:
        ValueError: a name of no module of the model, or a matrix of the layers without a number.
    """
    matrices = [name for index in range(len(stack)) for name in stack.input_shapes(index)]
    known = {*matrices, *(name for name, _ in stack.model.named_modules())}
    numbers = {name.removesuffix("."): value for name, value in found.values.items()}
    unknown = [name for name in numbers if name not in known]
    if unknown:
        raise ValueError(
            f"{field}: expected modules of the model, got {len(unknown)} of {len(numbers)} that it does not have, "
            f"the first {brief(unknown[0])}"
        )
    values, used, missing = dict[str, float](), set[str](), list[str]()
    for name in matrices:
        place = name
        while place and place not in numbers:
            place = place.rpartition(".")[0]
        used.add(place)
        if not place and found.rest is None:
            missing.append(name)
        values[name] = numbers[place] if place else found.rest or 0.0
    if missing:
        raise ValueError(
            f"{field}: expected a number for each matrix of the layers, got none for {len(missing)} of "
            f"{len(matrices)}, the first {missing[0]}"
        )
    return values, [name for name in numbers if name not in used]
