"""Values of parts of layers: the parts that share a value, and the values of their matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hf_cod.layers.parts import units_of
from hf_cod.layers.stack import DecoderLayers
from hf_cod.scoring.expert_scores import ExpertScores
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


def weights_of_parts(scores: LayerScores, groups: Sequence[PartScore], expert_scores: ExpertScores | None) -> Tensor:
    """The weights of the parts; without parts those of each layer outside of its routed experts. (parts,) float64."""
    if groups or expert_scores is None:
        return torch.tensor([group.weights for group in groups], dtype=torch.float64)
    left = list(scores.parameters)
    for name, layer in expert_scores.layers.items():
        left[layer] -= sum(expert_scores.parameters[name])
    # Layers of experts alone have nothing to distribute.
    return torch.tensor(left if any(left) else scores.parameters, dtype=torch.float64)


def scores_and_weights(scores: ExpertScores) -> tuple[Tensor, Tensor]:
    """The scores of all experts of a model, and their numbers of weights; (experts,) float64."""
    D = torch.tensor([value for own in scores.values.values() for value in own], dtype=torch.float64)
    return D, torch.tensor([size for own in scores.parameters.values() for size in own], dtype=torch.float64)


def values_with_experts(
    common: Sequence[float], parameters: Sequence[int], scores: ExpertScores, values: Sequence[float]
) -> tuple[dict[str, list[float]], list[float]]:
    """The values of experts by name, and the mean of each layer, weighted by parameters.

    Args:
        common: the value of each layer without its experts.
        parameters: the weights of each layer.
        scores: of the experts.
        values: one for each expert, in the order of the scores.
    """
    left, experts = iter(values), {}
    for name, own in scores.values.items():
        experts[name] = [next(left) for _ in own]
    sums, counts = [0.0] * len(common), [0] * len(common)
    for name, layer in scores.layers.items():
        sums[layer] += sum(v * n for v, n in zip(experts[name], scores.parameters[name], strict=True))
        counts[layer] += sum(scores.parameters[name])
    layers = zip(sums, counts, common, parameters, strict=True)
    return experts, [(total + x * (size - count)) / size if size else x for total, count, x, size in layers]


def values_of_parts(
    experts: Mapping[str, Sequence[float]], common: Sequence[float], stack: DecoderLayers
) -> dict[tuple[str, int | None], float]:
    """(name of a matrix, expert) -> value in a plan by expert; the expert is None if a matrix is a module of its own.

    Args:
        experts: name of the experts -> the value of each.
        common: the value of all other matrices of each layer.
        stack: the layers of the model.

    Raises:
        ValueError: other experts than the model has.
    """
    sets = {own.name: own for i in range(len(stack)) for own in stack.expert_sets(i) if not own.shared}
    for name in (*sets, *experts):
        expected, got = sets[name].count if name in sets else 0, len(experts.get(name, ()))
        if expected != got:
            raise ValueError(f"plan: expected values of {expected} experts of {name}, got {got}")
    found: dict[tuple[str, int | None], float] = {}
    for name, own in sets.items():
        for expert, value in enumerate(experts[name]):
            found |= dict.fromkeys(own.matrices_of(expert), value)
    known = {name for name, _ in found}
    for index, value in enumerate(common):
        found |= {(name, None): value for name in stack.input_shapes(index) if name not in known}
    return found


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
