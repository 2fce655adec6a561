"""The order in which matrices get four bits: by layer, or by expert."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence

from hf_cod.compression.quantization.settings import StorageSettings
from hf_cod.compression.quantization.widths import Size, Width, count_codes, stored_bits, width_of
from hf_cod.functional.bits import BITS
from hf_cod.layers.experts import ExpertSet
from hf_cod.layers.stack import DecoderLayers
from hf_cod.scoring.expert_scores import ExpertScores
from hf_cod.scoring.layer_scores import LayerScores
from hf_cod.scoring.part_plans import groups_of

FEW, MANY = min(BITS), max(BITS)

Unit = tuple[str, "int | None"]
"""(name of a matrix, expert): what has bits of its own. The expert is None if the matrix has a module of its own."""


class Units:
    """The matrices of the layers that are quantized, those of banks by expert.

    Args:
        stack: the layers.
        sizes: name -> size of these matrices, for each layer.
        scores: of the experts; None: they are in the order of the model.
    """

    def __init__(
        self, stack: DecoderLayers, sizes: Sequence[Mapping[str, Size]], scores: ExpertScores | None = None
    ) -> None:
        self._sizes = {name: size for layer in sizes for name, size in layer.items()}
        self._scored = scores is not None
        # Of each layer: what all tokens enter, and the (score, units) of each routed expert.
        self._layers: list[tuple[list[Unit], list[tuple[float, list[Unit]]]]] = []
        for index, layer in enumerate(sizes):
            routed: list[tuple[float, list[Unit]]] = []
            for experts in stack.expert_sets(index):
                if not experts.shared:
                    values = [0.0] * experts.count if scores is None else scores.values[experts.name]
                    routed += [(values[e], _of_expert(experts, e, layer)) for e in range(experts.count)]
            known = {unit for _, units in routed for unit in units}
            common = [unit for name, size in layer.items() for unit in _of_matrix(name, size) if unit not in known]
            self._layers.append((common, sorted(routed, key=lambda one: -one[0])))

    def groups(self, values: Sequence[float]) -> list[list[Unit]]:
        """In the order in which they get four bits: the layers with the highest values first. With scores of experts,
        first what all tokens enter, layer by layer, then the experts with the highest scores of all layers.

        Args:
            values: one for each layer.
        """
        order = sorted(range(len(self._layers)), key=lambda i: -values[i])
        if not self._scored:
            return [self.of_layer(index) for index in order]
        routed = [one for index in order for one in self._layers[index][1]]
        ranked = [units for _, units in sorted(routed, key=lambda one: -one[0])]
        return [*(self._layers[index][0] for index in order), *ranked]

    def parts(self, names: Sequence[Sequence[str]]) -> list[list[Unit]]:
        """The units of parts of layers; those of matrices that are not quantized are left out."""
        stored = [[own for name in part for own in stored_names(name, self._sizes)] for part in names]
        return [[unit for name in part for unit in _of_matrix(name, self._sizes[name])] for part in stored]

    def of_layer(self, index: int) -> list[Unit]:
        """Those of one layer: first what all tokens enter, then expert by expert."""
        common, routed = self._layers[index]
        return [*common, *(unit for _, units in routed for unit in units)]

    def count_codes(self, unit: Unit, storage: StorageSettings) -> int:
        """The number of stored codes of a unit."""
        return count_codes(self._size(unit), storage)

    def price(self, unit: Unit, storage: StorageSettings) -> int:
        """The number of stored bits that four bits cost in addition."""
        return stored_bits(self._size(unit), MANY, storage) - stored_bits(self._size(unit), FEW, storage)

    def bits(self, many: set[Unit]) -> dict[str, Width]:
        """Name -> bits of all matrices, if these units have four."""
        found: dict[str, Width] = {}
        for name, size in self._sizes.items():
            found[name] = width_of([MANY if unit in many else FEW for unit in _of_matrix(name, size)])
        return found

    def _size(self, unit: Unit) -> Size:
        return self._sizes[unit[0]][-2:]


def stored_names(name: str, known: Container[str]) -> list[str]:
    """The names under which a matrix is stored: its own, or those of its factors, if it is one of a bank."""
    return [found for found in (name, f"{name}.reduce", f"{name}.expand") if found in known]


def ranked(scores: LayerScores) -> list[list[str]]:
    """The parts of the scores, highest first; matrices that engines fuse are one part. Ties keep the model's order."""
    return [[*part.sizes] for part in sorted(groups_of(scores, fuses=True), key=lambda part: -part.value)]


def within_budget(
    units: Units, groups: Sequence[Sequence[Unit]], budget: float, storage: StorageSettings, whole: bool = False
) -> tuple[set[Unit], int]:
    """(The units that get four bits, what they cost): whole groups, and of the next one what fits; or, with `whole`,
    each group that still fits.
    """
    many: set[Unit] = set()
    spent = 0
    if whole:
        for group in groups:
            price = sum(units.price(unit, storage) for unit in group)
            if spent + price <= budget:
                many |= {*group}
                spent += price
        return many, spent
    for group in groups:
        for unit in group:
            price = units.price(unit, storage)
            if spent + price <= budget:
                many.add(unit)
                spent += price
        if not many.issuperset(group):
            break
    return many, spent


def within_mean(units: Units, layer: Sequence[Unit], value: float, storage: StorageSettings) -> set[Unit]:
    """The units of a layer that get four bits for a mean of `value`: in order, while they fit.

    Raises:
        ValueError: a value out of range.
    """
    if layer and not FEW <= value <= MANY:
        raise ValueError(f"bits: expected 3 or 4, got {value:g} for {layer[0][0]}")
    codes = {unit: units.count_codes(unit, storage) for unit in layer}
    left = (value - FEW) * sum(codes.values()) + 0.5  # of a code, for rounding
    found: set[Unit] = set()
    for unit, count in codes.items():
        if count <= left:
            found.add(unit)
            left -= count
    return found


def _of_matrix(name: str, size: Size) -> list[Unit]:
    return [(name, None)] if len(size) == 2 else [(name, expert) for expert in range(size[0])]


def _of_expert(experts: ExpertSet, expert: int, sizes: Mapping[str, Size]) -> list[Unit]:
    """The matrices of one expert that are quantized."""
    stored = [(own, place) for name, place in experts.matrices_of(expert) for own in stored_names(name, sizes)]
    # A basis that all experts share is no expert's.
    return [(own, place) for own, place in stored if place is None or sizes[own][0] == experts.count]
