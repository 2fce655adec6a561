"""The channels of the experts of a layer, as units: each expert keeps equally many of them, of its own choice.

A bank stays one tensor, and the config can say the number of channels. Which rows of a fused matrix belong to a channel
(two halves, or neighbours) is no matter of names: `unit_discovery.py` tries both, and `unit_checks.py` decides.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_cod.functional.channels import rows_of
from hf_cod.layers.expert_discovery import expert_sets
from hf_cod.layers.experts import ExpertMatrix, ExpertSet, ListedMatrix
from hf_cod.layers.orientation import set_shape, shape_of, turned
from hf_cod.layers.units import EXPERTS, Changes, Units, changes_of, set_parameter, set_units, tensors_of_units
from hf_cod.models.shapes import set_number

# Products of tokens with all experts at once (`grouped_mm`) take rows of multiples of 16 bytes, 8 numbers of 16 bits.
ALIGNED = 8


@dataclass(frozen=True, eq=False)
class ExpertUnits(Units):
    """The channels of the experts of a bank or a list; `readers`, `writer` and `columns` are those of each expert.

    Attributes:
        experts: their number.
        linears: of a list: name of a matrix ("experts.*.w1") -> names of the Linears, one for each expert.
        transposed: names of matrices that are stored as (in, out).
        stacked: names of matrices that are stored as (experts x rows, columns).
        biases: names of matrices of banks with a bias (experts, out).
    """

    experts: int = 1
    linears: dict[str, list[str]] = field(default_factory=dict)
    transposed: frozenset[str] = frozenset()
    stacked: frozenset[str] = frozenset()
    biases: frozenset[str] = frozenset()

    @property
    def matrices(self) -> list[str]:
        """Names of the matrices; of a list, those of all Linears."""
        names = [*self.readers, self.writer]
        return [linear for name in names for linear in self.linears.get(name, [name])]

    def inside(self, prefix: str) -> ExpertUnits:
        """The same units with names that begin with `prefix`."""
        moved = super().inside(prefix)
        assert isinstance(moved, ExpertUnits)
        return replace(
            moved,
            linears={prefix + name: [prefix + each for each in linears] for name, linears in self.linears.items()},
            transposed=frozenset(prefix + name for name in self.transposed),
            stacked=frozenset(prefix + name for name in self.stacked),
            biases=frozenset(prefix + name for name in self.biases),
        )

    def matrix(self, root: nn.Module, name: str) -> ExpertMatrix | ListedMatrix:
        """The matrix of that name of all experts, in the module in which the units' names are valid."""
        if self.linears:
            return ListedMatrix(name, {linear: root.get_submodule(linear) for linear in self.linears[name]})
        bank, _, key = name.rpartition(".")
        return ExpertMatrix(bank, root.get_submodule(bank), key, self.experts, name in self.transposed)

    def weights_of(self, root: nn.Module, expert: int) -> dict[str, Tensor]:
        """Name -> weight (out, in) of each matrix of one expert."""
        return {name: self.matrix(root, name).read(expert).detach() for name in (*self.readers, self.writer)}

    def parameters(self, root: nn.Module) -> Iterator[tuple[str, str, int | None, str]]:
        """(name of a parameter, its matrix, its expert or None for all of them, "weight" or "bias")."""
        for name in (*self.readers, self.writer):
            for expert, linear in enumerate(self.linears.get(name, [])):
                yield f"{linear}.weight", name, expert, "weight"
                if root.get_submodule(linear).bias is not None:
                    yield f"{linear}.bias", name, expert, "bias"
            if not self.linears:
                yield name, name, None, "weight"
                if name in self.biases:
                    yield f"{name}_bias", name, None, "bias"


def expert_units(layer: nn.Module, width: int) -> list[list[ExpertUnits]]:
    """For each set of experts of a layer, the ways in which its rows may belong to channels; the largest set first.

    Args:
        layer: the layer, with weights in memory.
        width: size of the hidden state, which experts read and write.
    """
    found = []
    for experts in expert_sets(layer, _ROOT):
        options = [units for writer in reversed(experts.matrices) for units in _of_set(layer, experts, writer, width)]
        if options:
            found.append(options)
    return sorted(found, key=lambda options: -options[0].weights * options[0].count)


def other_sets(layer: nn.Module, chosen: ExpertUnits) -> list[str]:
    """Names of the sets of experts of a layer beside the one of these units."""
    sets = {one.name: {matrix.name for matrix in one.matrices} for one in expert_sets(layer, _ROOT)}
    return [name.removeprefix(f"{_ROOT}.") for name, own in sets.items() if f"{_ROOT}.{chosen.writer}" not in own]


_ROOT = "layer"


def _of_set(
    layer: nn.Module, experts: ExpertSet, writer: ExpertMatrix | ListedMatrix, width: int
) -> Iterator[ExpertUnits]:
    """The units, if this matrix is the one that writes to the hidden state."""
    rows, count = writer.shape
    readers = [matrix for matrix in experts.matrices if matrix is not writer]
    sizes = [matrix.shape for matrix in readers]
    plain = all(isinstance(m, ListedMatrix) or isinstance(m.parameter, nn.Parameter) for m in experts.matrices)
    if not plain or not readers or rows != width or count < 2:
        return
    if any(columns != width or out not in (count, 2 * count) for out, columns in sizes):
        return
    halves, neighbours = torch.arange(2 * count) % count, torch.arange(2 * count) // 2
    for fused in [halves, neighbours] if any(out != count for out, _ in sizes) else [halves]:
        own = {m.name: fused if m.shape[0] != count else torch.arange(count) for m in readers}
        yield _made(experts, own, writer, count)


def _made(
    experts: ExpertSet, readers: Mapping[str, Tensor], writer: ExpertMatrix | ListedMatrix, count: int
) -> ExpertUnits:
    def short(name: str) -> str:
        return name.removeprefix(f"{_ROOT}.")

    banked = experts.banked
    listed = [matrix for matrix in experts.matrices if isinstance(matrix, ListedMatrix)]
    return ExpertUnits(
        kind=EXPERTS,
        count=count,
        heads=1,
        readers={short(name): owners for name, owners in readers.items()},
        writer=short(writer.name),
        columns=torch.arange(count),
        vectors={},
        numbers={},
        weights=sum(experts.sizes()) // count,
        experts=experts.count,
        linears={short(matrix.name): [short(name) for name in matrix.linears] for matrix in listed},
        transposed=frozenset(short(matrix.name) for matrix in banked if matrix.transposed),
        stacked=frozenset(short(matrix.name) for matrix in banked if matrix.parameter.dim() == 2),
        biases=frozenset(short(matrix.name) for matrix in banked if matrix.bias is not None),
    )


def kept_of_experts(root: nn.Module, units: ExpertUnits, kept: Tensor) -> dict[str, Tensor]:
    """Name -> parameter with the rows and columns of the kept channels.

    Args:
        root: the module in which the units' names are valid.
        units: of the intact layer.
        kept: (experts, kept) indices of channels.
    """
    weights, places = [], []
    for number, own in enumerate(kept.cpu()):
        W = units.weights_of(root, number)
        rows = {name: rows_of(own, owners).to(W[name].device) for name, owners in units.readers.items()}
        k = rows_of(own, units.columns).to(W[units.writer].device)
        weights.append({**{n: W[n][rows[n]] for n in units.readers}, units.writer: W[units.writer][:, k]})
        places.append(rows)
    found: dict[str, Tensor] = {}
    for parameter, name, expert, key in units.parameters(root):
        chosen = [*range(units.experts)] if expert is None else [expert]
        if key == "weight":
            found[parameter] = stored_of(root, units, name, expert, [weights[e][name] for e in chosen])
        else:
            b = root.get_parameter(parameter).detach()
            each = [b[e] if expert is None else b for e in chosen]
            if name != units.writer:
                each = [one[places[e][name]] for e, one in zip(chosen, each, strict=True)]
            found[parameter] = torch.stack(each) if expert is None else each[0]
    return found


def stored_of(root: nn.Module, units: ExpertUnits, name: str, expert: int | None, matrices: Sequence[Tensor]) -> Tensor:
    """A parameter as the model stores it, of the matrices (out, in) of its experts."""
    if expert is not None:
        return turned(root.get_submodule(units.linears[name][expert]), matrices[0])
    stored = torch.stack([W.mT if name in units.transposed else W for W in matrices])
    return stored.flatten(0, 1) if name in units.stacked else stored


def zero_experts(root: nn.Module, units: ExpertUnits, kept: Tensor) -> None:
    """Sets the columns of all other channels in the writer to zero: then they add nothing to the hidden state."""
    matrix = units.matrix(root, units.writer)
    for expert, own in enumerate(kept):
        gone = torch.ones(units.count, dtype=torch.bool)
        gone[own] = False
        matrix.read(expert)[:, gone] = 0


def sizes_of_experts(units: ExpertUnits, kept: int) -> Changes:
    """The sizes that `set_experts` changes, as in `models/shapes.py`."""
    changes: Changes = {}
    for name in (*units.readers, units.writer):
        is_writer = name == units.writer
        size = kept if is_writer else kept * len(units.readers[name]) // units.count
        for linear in units.linears.get(name, []):
            changes[linear] = {"in_features" if is_writer else "out_features": size}
        if units.linears:
            continue
        bank, _, key = name.rpartition(".")
        is_last = is_writer != (name in units.transposed)
        stacked = name in units.stacked
        dimension = (1 if stacked else 2) if is_last else (0 if stacked else 1)
        times = units.experts if stacked and not is_last else 1
        changes.setdefault(bank, {})[f"{key}.{dimension}"] = size * times
        if name in units.biases and not is_writer:
            changes[bank][f"{key}_bias.1"] = size
    for name, numbers in units.numbers.items():
        changes.setdefault(name, {}).update({key: each * kept for key, each in numbers.items()})
    return changes


def set_experts(root: nn.Module, units: ExpertUnits, kept: int, tensors: Mapping[str, Tensor]) -> Changes:
    """Sets the parameters of intact experts to those of `kept` channels of each; a bias of Linears may be new.

    Returns:
        The changed sizes.

    Raises:
        ValueError: a tensor is missing or has another shape; the layer is left unchanged.
    """
    changes = sizes_of_experts(units, kept)
    own = [*units.parameters(root)]
    there = {parameter for parameter, *_ in own}
    for number, linear in enumerate(units.linears.get(units.writer, [])):
        if f"{linear}.bias" in tensors:
            changes[linear]["bias"] = 1
            if f"{linear}.bias" not in there:
                own.append((f"{linear}.bias", units.writer, number, "bias"))
    for parameter, name, expert, _ in own:
        tensor, shape = tensors.get(parameter), _shape(root, changes, units, parameter, name, expert)
        if tensor is None or tuple(tensor.shape) != shape:
            raise ValueError(
                f"{parameter}: expected shape {shape}, got {None if tensor is None else tuple(tensor.shape)}"
            )
    for parameter, _, expert, key in own:
        module_name, _, attribute = parameter.rpartition(".")
        module: Any = root.get_submodule(module_name)
        like = getattr(module, attribute)
        set_parameter(module, attribute, tensors[parameter], module.weight if like is None else like)
        if expert is not None and key == "weight":
            set_shape(module, *turned(module, module.weight).shape)
    for name, numbers in units.numbers.items():
        for key, each in numbers.items():
            set_number(root.get_submodule(name), key, each * kept)
    return changes


def _shape(
    root: nn.Module, changes: Changes, units: ExpertUnits, parameter: str, name: str, expert: int | None
) -> tuple[int, ...]:
    """The shape of a parameter with the changed sizes."""
    module_name, _, attribute = parameter.rpartition(".")
    sizes = changes.get(module_name, {})
    if expert is None:
        stored = root.get_parameter(parameter).shape
        return tuple(sizes.get(f"{attribute}.{place}", size) for place, size in enumerate(stored))
    module = root.get_submodule(module_name)
    rows, columns = shape_of(module)
    rows, columns = sizes.get("out_features", rows), sizes.get("in_features", columns)
    if attribute == "bias":
        return (rows,)
    return tuple(turned(module, torch.empty(rows, columns, device="meta")).shape)


def tensors_of(root: nn.Module, units: Units) -> dict[str, Tensor]:
    """Name -> parameter of which a part belongs to units of any kind."""
    if not isinstance(units, ExpertUnits):
        return tensors_of_units(root, units)
    return {parameter: root.get_parameter(parameter).detach() for parameter, *_ in units.parameters(root)}


def sizes_of(units: Units, kept: int) -> Changes:
    """The sizes that fewer units of any kind change, without biases that are added."""
    return sizes_of_experts(units, kept) if isinstance(units, ExpertUnits) else changes_of(units, kept)


def set_sizes(root: nn.Module, units: Units, kept: int, tensors: dict[str, Tensor]) -> Changes:
    """Sets the tensors of units of any kind; see `set_units` and `set_experts`."""
    change = set_experts if isinstance(units, ExpertUnits) else set_units
    return change(root, units, kept, tensors)  # type: ignore[arg-type]
