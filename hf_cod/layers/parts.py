"""Parts of a layer that have a score, a sparsity, a width or a rank of their own: its blocks, or matrices."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hf_cod.layers.stack import DecoderLayers

# Last parts of the names of matrices that engines fuse, because they have the same input.
FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("w1", "w3"),
)
_EXPERTS = re.compile(r".*\.experts(?=\.)")


@dataclass(frozen=True)
class Part:
    """Matrices of one layer, by name."""

    layer: int
    names: tuple[str, ...]


def parts_of(stack: DecoderLayers, granularity: str, fuses: bool = False) -> list[Part]:
    """All matrices of the layers, in the order of the model.

    A block is what one child module of the layer contains; matrices that the layer holds itself are one block.

    Args:
        stack: the layers.
        granularity: "layer", "block" or "module".
        fuses: whether a matrix forms one part with those that an engine fuses with it.
    """
    found: list[Part] = []
    for index in range(len(stack)):
        names = [*stack.input_shapes(index)]
        if granularity == "layer":
            groups = [names] if names else []
        elif granularity == "block":
            groups = _blocks(names, f"{stack.layers_path}.{index}.")
        else:
            groups = units_of(names, fuses)
        found += [Part(index, tuple(group)) for group in groups]
    return found


def units_of(names: Iterable[str], fuses: bool) -> list[list[str]]:
    """The matrices of a layer by the units that have one width: those that an engine fuses, and all experts."""
    units: dict[str, list[str]] = {}
    for name in names:
        parent, _, last = name.rpartition(".")
        experts = _EXPERTS.match(name)
        group = next((g for g in FUSED if last in g), (last,))
        key = experts[0] if experts else f"{parent}.{group[0]}"
        units.setdefault(key if fuses else name, []).append(name)
    return [*units.values()]


def _blocks(names: Sequence[str], prefix: str) -> list[list[str]]:
    blocks: dict[str, list[str]] = {}
    for name in names:
        child, _, inside = name.removeprefix(prefix).partition(".")
        blocks.setdefault(child if inside else "", []).append(name)
    return [*blocks.values()]
