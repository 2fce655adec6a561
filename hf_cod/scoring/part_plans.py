"""Values of parts of layers: the parts that share a value, and the values of their matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hf_cod.layers.parts import units_of
from hf_cod.layers.stack import DecoderLayers
from hf_cod.scoring.layer_scores import LayerScores, PartScore


def groups_of(scores: LayerScores, fuses: bool) -> list[PartScore]:
    """The parts of the scores; if `fuses`, matrices that an engine fuses are one part, with their mean score."""
    if not fuses or scores.granularity == "block":
        return [part for part in scores.parts if part.weights]
    layers: dict[int, dict[str, int]] = {}
    for part in scores.parts:
        layers.setdefault(part.layer, {}).update(part.sizes)
    groups = [
        PartScore(layer, scores.value_of(layer, names), {name: sizes[name] for name in names})
        for layer, sizes in layers.items()
        for names in units_of(sizes, True)
    ]
    return [group for group in groups if group.weights]


def values_of_matrices(
    scores: LayerScores, groups: Sequence[PartScore], values: Sequence[float], budget: float
) -> tuple[dict[str, float], list[float]]:
    """The value of each matrix, and the mean of each layer; a layer without matrices has the budget."""
    modules = {name: value for group, value in zip(groups, values, strict=True) for name in group.sizes}
    sums, counts = [0.0] * len(scores.values), [0] * len(scores.values)
    for group, value in zip(groups, values, strict=True):
        sums[group.layer] += value * group.weights
        counts[group.layer] += group.weights
    return modules, [total / count if count else budget for total, count in zip(sums, counts, strict=True)]


def check_names_of_matrices(values: Mapping[str, float], stack: DecoderLayers) -> None:
    """Checks that the values of a plan are those of the matrices of the layers.

    Raises:
        ValueError: names a matrix without a value, or a value without a matrix.
    """
    names = {name for index in range(len(stack)) for name, shape in stack.input_shapes(index).items() if all(shape)}
    if names - values.keys():
        raise ValueError(f"plan: expected a value for each matrix, got none for {min(names - values.keys())}")
    known = names | stack.excluded | {name for i in range(len(stack)) for name in stack.input_shapes(i)}
    if values.keys() - known:
        raise ValueError(f"plan: expected matrices of the model, got {min(values.keys() - known)!r}")
