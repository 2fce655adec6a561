"""Finds the experts of a layer and their router, by structure and by attributes that count experts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from hf_cod.layers.expert_counts import counts_of, is_top_k
from hf_cod.layers.experts import ExpertMatrix, ExpertSet, ListedMatrix, Router, expert_matrices
from hf_cod.layers.modules import is_linear_like, walk
from hf_cod.layers.orientation import shape_of


def expert_sets(layer: nn.Module, path: str) -> list[ExpertSet]:
    """All experts of a layer.

    Banks of one matrix each, side by side (JetMoe), are one set.

    Args:
        layer: the layer.
        path: its name in the model.
    """
    modules = dict(walk(layer, path))
    banks: dict[str, list[ExpertMatrix]] = {}
    for name, module in modules.items():
        if found := expert_matrices([(name, module)]):
            parent = name.rpartition(".")[0]
            place = parent if len(found) == 1 and name != path else name
            banks.setdefault(place, []).extend(found)
    listed = {name: lists for name, m in modules.items() if (lists := _of_list(name, m))}
    inside = [matrix.bank for found in banks.values() for matrix in found] + [*listed]
    sets = []
    for name, found in banks.items():
        counts = {matrix.experts for matrix in found}
        shared = not counts & counts_of(found[0].module) and any("shared" in key for key in vars(found[0].module))
        router = None if shared else _router(modules, path, found[0].bank, counts, inside)
        sets.append(ExpertSet(found[0].bank if len(found) == 1 else name, min(counts), found, router, shared))
    for name, linears in listed.items():
        count = linears[0].experts
        router = _router(modules, path, name, {count}, inside)
        if (router is not None and count > 1) or _counts_in(modules, name, count):
            sets.append(ExpertSet(name, count, linears, router, modules=[*listed_experts(modules[name]).values()]))
    return sets


def listed_experts(module: nn.Module) -> dict[str, nn.Module]:
    """Key -> module of those in a list or dict that have weights; none of another module. NLLB-MoE holds a dropout
    beside its experts.
    """
    if not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return {}
    return {key: child for key, child in module._modules.items() if child is not None and [*child.parameters()]}


def _of_list(name: str, module: nn.Module) -> list[ListedMatrix]:
    """The matrices of modules in a list that are alike and have several matrices each, as experts are."""
    children = listed_experts(module)
    if not children:
        return []
    found = [
        {inner: m for inner, m in walk(child, f"{name}.{key}") if is_linear_like(m)} for key, child in children.items()
    ]
    shapes = [[(inner.split(".")[name.count(".") + 2 :], shape_of(m)) for inner, m in one.items()] for one in found]
    alike = len({type(child) for child in children.values()}) == 1 and all(each == shapes[0] for each in shapes)
    if not alike or len({*map(id, children.values())}) != len(children) or len(found[0]) < 2:
        return []
    ends = [".".join(end) for end, _ in shapes[0]]
    listed = [dict([*one.items()][place] for one in found) for place in range(len(ends))]
    return [ListedMatrix(f"{name}.*.{end}", linears) for end, linears in zip(ends, listed, strict=True)]


def _counts_in(modules: dict[str, nn.Module], name: str, count: int) -> bool:
    """Whether a list, or the module that it is in, counts its entries as experts in an attribute."""
    around = [modules[name], modules.get(name.rpartition(".")[0])]
    return any(m is not None and count in counts_of(m) for m in around)


def _router(
    modules: dict[str, nn.Module], path: str, place: str, counts: set[int], inside: Sequence[str]
) -> Router | None:
    """The router of the experts at `place`: a matrix with a row for each, in the smallest part of the layer around them
    that has one. A module that counts experts comes before others with as many rows, such as a gate of one row.
    """
    around = place
    while around != path:
        around = around.rpartition(".")[0]
        found: list[tuple[int, int, str, str]] = []
        for name, module in modules.items():
            if name.startswith(f"{around}.") and not any(f"{name}.".startswith(f"{one}.") for one in inside):
                counted = bool(counts & (counts_of(module) | _above(modules, name, around)))
                for key, (rows, columns) in _two_dimensional(module):
                    exact = rows in counts and (counted or rows > 1)
                    if rows < columns and (exact or (counted and rows > max(counts))):
                        found.append((0 if exact and counted else 1 if exact else 2, rows, name, key))
        if found:
            _, _, name, key = min(found, key=lambda one: one[:2])
            return Router(name, modules[name], key, _top_k(modules, name, around))
    return None


def _above(modules: dict[str, nn.Module], name: str, around: str) -> set[int]:
    """The numbers of experts that the modules around a matrix count, inside of `around`."""
    found: set[int] = set()
    while (name := name.rpartition(".")[0]) != around:
        found |= counts_of(modules[name]) if name in modules else set()
    return found


def _two_dimensional(module: nn.Module) -> Iterator[tuple[str, tuple[int, int]]]:
    """(key, (rows, columns)) of each matrix that a module holds itself."""
    if is_linear_like(module):
        yield "weight", shape_of(module)
        return
    for key, p in module.named_parameters(recurse=False):
        if p.dim() == 2 and "bias" not in key:
            yield key, (p.shape[0], p.shape[1])


def _top_k(modules: dict[str, nn.Module], name: str, around: str) -> int | None:
    """What an attribute of the router, or of a module around it, says; that of the experts' part of the layer last."""
    while name in modules:
        for key, value in vars(modules[name]).items():
            if is_top_k(key) and type(value) is int:
                return value
        if name == around:
            return None
        name = name.rpartition(".")[0]
    return None
