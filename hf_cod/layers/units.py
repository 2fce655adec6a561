"""Heads and channels that can be removed from a layer independently of its other parts.

No table of names says which matrices belong together: `unit_discovery.py` measures on a copy of the layer with random
weights which rows of which matrices act on which columns of a later one, and `unit_checks.py` compares the copy with
fewer units to the copy with zeroed ones. What depends on single heads in another way (positions by head, norms with a
mean over all heads, a number that a module computes with) fails this comparison, is excluded, and the reason is
reported.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_cod.functional.channels import rows_of
from hf_cod.layers.modules import is_norm
from hf_cod.layers.orientation import set_shape, shape_of, turned
from hf_cod.models.shapes import set_number

HEADS, CHANNELS, EXPERTS = KINDS = ("heads", "channels", "expert_channels")
Changes = dict[str, dict[str, int]]
"""Module's name -> its changed sizes, as in `models/shapes.py`."""


@dataclass(frozen=True, eq=False)
class Units:
    """The heads or channels of one layer, each of which can be removed separately.

    Attributes:
        kind: "heads", "channels" or "expert_channels"; for the last see `expert_units.py`.
        count: number of units; for heads, of the smallest groups that share no key and value head, unless all do.
        heads: number of query heads in one unit; 1 for channels.
        readers: name of each matrix with rows of units -> (out,) the unit of each row; -1 for rows that all units
            share.
        writer: name of the matrix whose columns are those of the units.
        columns: (in,) the unit of each column of the writer.
        vectors: name of each other parameter with one number for each row, such as a norm over all heads -> (size,)
            the unit of each number, or -1.
        numbers: module's name -> name of its attribute, or "config.NAME" for a number that it reads from its config ->
            contribution of one unit to it.
        weights: number of weights of one unit in the matrices.
    """

    kind: str
    count: int
    heads: int
    readers: dict[str, Tensor]
    writer: str
    columns: Tensor
    vectors: dict[str, Tensor]
    numbers: dict[str, dict[str, int]]
    weights: int

    @property
    def matrices(self) -> list[str]:
        """Names of the matrices."""
        return [*self.readers, self.writer]

    def inside(self, prefix: str) -> Units:
        """The same units with names that begin with `prefix`."""
        return replace(
            self,
            readers={prefix + name: owners for name, owners in self.readers.items()},
            writer=prefix + self.writer,
            vectors={prefix + name: owners for name, owners in self.vectors.items()},
            numbers={(prefix + name).rstrip("."): each for name, each in self.numbers.items()},
        )


@dataclass(frozen=True)
class LayerUnits:
    """The removable units of a layer.

    Attributes:
        found: at most one entry of each kind.
        whole: sentences that say why a part is not narrowed.
    """

    found: list[Units] = field(default_factory=list)
    whole: list[str] = field(default_factory=list)

    def __getitem__(self, kind: str) -> Units | None:
        return next((units for units in self.found if units.kind == kind), None)


def tensors_of_units(root: nn.Module, units: Units) -> dict[str, Tensor]:
    """Name -> weight, bias or vector of which a part belongs to units."""
    modules = {name: root.get_submodule(name) for name in (*units.readers, units.writer)}
    found = {f"{n}.{key}": p.detach() for n, m in modules.items() for key, p in m.named_parameters(recurse=False)}
    return found | {name: root.get_parameter(name).detach() for name in units.vectors}


def kept_rows(root: nn.Module, units: Units, kept: Tensor) -> dict[str, Tensor]:
    """The rows of kept units: name -> weight, bias or vector with their rows, and with those that all units share.

    Norms over all heads are scaled: n numbers of which some are 0 have a mean square that is lower by n' / n than that
    of the n' others, so that fewer heads equal zeroed ones only with weights multiplied by sqrt(n / n').

    Args:
        root: the module in which the units' names are valid.
        units: of the intact layer.
        kept: (kept,) indices of units.
    """
    found: dict[str, Tensor] = {}
    for name, owners in units.readers.items():
        module: Any = root.get_submodule(name)
        W = turned(module, module.weight.detach())
        rows = rows_of(kept.cpu(), owners).to(W.device)
        found[f"{name}.weight"] = turned(module, W[rows])
        if module.bias is not None:
            found[f"{name}.bias"] = module.bias.detach()[rows]
    for name, owners in units.vectors.items():
        values = root.get_parameter(name).detach()
        rows = rows_of(kept.cpu(), owners).to(values.device)
        module = root.get_submodule(name.rpartition(".")[0])
        scale = (len(owners) / len(rows)) ** 0.5 if is_norm(module) and name.endswith(".weight") else 1
        found[name] = values[rows] * scale
    return found


def set_units(root: nn.Module, units: Units, kept: int, tensors: dict[str, Tensor]) -> Changes:
    """Sets the tensors of an intact layer to those of `kept` units; a tensor that is not given is kept.

    Args:
        root: the module in which the units' names are valid.
        units: of the intact layer.
        kept: number of units.
        tensors: name -> weight, bias or vector with the rows and columns of these units.

    Returns:
        The changed sizes.

    Raises:
        ValueError: a tensor is missing or has another shape; the layer is left unchanged.
    """
    _check_shapes(root, units, kept, tensors)
    changes: Changes = {}
    for name in (*units.readers, units.writer):
        module: Any = root.get_submodule(name)
        had_bias = module.bias is not None
        like = module.weight
        for key in ("weight", "bias"):
            if f"{name}.{key}" in tensors:
                set_parameter(module, key, tensors[f"{name}.{key}"], like)
        rows, columns = turned(module, module.weight).shape
        set_shape(module, rows, columns)
        changes[name] = {"in_features": columns} if name == units.writer else {"out_features": rows}
        if module.bias is not None and not had_bias:
            changes[name]["bias"] = 1
    for name in units.vectors:
        module_name, _, key = name.rpartition(".")
        module = root.get_submodule(module_name)
        set_parameter(module, key, tensors[name], getattr(module, key))
        if isinstance(getattr(module, "normalized_shape", None), tuple):
            module.normalized_shape = tuple(getattr(module, key).shape)
        changes.setdefault(module_name, {})[key] = len(tensors[name])
    for name, numbers in units.numbers.items():
        module = root.get_submodule(name)
        changes.setdefault(name, {}).update({key: each * kept for key, each in numbers.items()})
        for key, each in numbers.items():
            set_number(module, key, each * kept)
    return changes


def changes_of(units: Units, kept: int) -> Changes:
    """The sizes that `set_units` would change, without biases that are added."""
    chosen = torch.arange(kept)
    changes: Changes = {name: {"out_features": len(rows_of(chosen, own))} for name, own in units.readers.items()}
    changes[units.writer] = {"in_features": len(rows_of(chosen, units.columns))}
    for name, owners in units.vectors.items():
        module, _, key = name.rpartition(".")
        changes.setdefault(module, {})[key] = len(rows_of(chosen, owners))
    for name, numbers in units.numbers.items():
        changes.setdefault(name, {}).update({key: each * kept for key, each in numbers.items()})
    return changes


def _check_shapes(root: nn.Module, units: Units, kept: int, tensors: dict[str, Tensor]) -> None:
    """Checks tensors that may come from a file; those of matrices may be missing, and a bias of the writer be new."""
    chosen = torch.arange(kept)
    for name in (*units.readers, units.writer):
        module: Any = root.get_submodule(name)
        rows, columns = shape_of(module)
        if name == units.writer:
            columns = len(rows_of(chosen, units.columns))
        else:
            rows = len(rows_of(chosen, units.readers[name]))
        if f"{name}.weight" in tensors:
            weight = tensors[f"{name}.weight"]
            _check_shape(f"{name}.weight", turned(module, weight) if weight.dim() == 2 else weight, (rows, columns))
        if f"{name}.bias" in tensors:
            _check_shape(f"{name}.bias", tensors[f"{name}.bias"], (rows,))
    for name, owners in units.vectors.items():
        _check_shape(name, tensors.get(name), (len(rows_of(chosen, owners)),))


def _check_shape(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is None or tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {None if tensor is None else tuple(tensor.shape)}")


def set_parameter(module: Any, key: str, values: Tensor, like: Tensor) -> None:
    """A new parameter of a module with these values, on the device and in the dtype of another."""
    values = values.to(device=like.device, dtype=like.dtype).contiguous()
    setattr(module, key, nn.Parameter(values, requires_grad=like.requires_grad))
