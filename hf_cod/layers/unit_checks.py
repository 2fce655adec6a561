"""Compares a copy of a layer with fewer units to the copy with zeroed ones, before a weight of the model changes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from hf_cod.functional.channels import rows_of
from hf_cod.io.display import quoted
from hf_cod.layers.expert_units import ALIGNED, ExpertUnits, kept_of_experts, set_sizes, zero_experts
from hf_cod.layers.layer_copies import LayerCopy
from hf_cod.layers.orientation import is_linear, turned
from hf_cod.layers.running import hidden_place, tensors_of
from hf_cod.layers.units import CHANNELS, EXPERTS, HEADS, Units, kept_rows, set_parameter, tensors_of_units
from hf_cod.models.shapes import LAYER_INDEX_ATTRIBUTES

# Relative to the largest change by zeroed units; both are computed in float32, in other orders.
TOLERANCE = 1e-3
# Names of numbers that count units, and of numbers that do not although their value may fit.
_COUNTS = {
    HEADS: re.compile("head"),
    CHANNELS: re.compile("intermediate|inner|ffn"),
    EXPERTS: re.compile("intermediate|inner|ffn|expert_dim"),
}
_OTHERS = re.compile(r"(?<!all_)head_(dim|size)$|group")


def first_that_fits(taken: LayerCopy, options: Sequence[Units]) -> Units | str:
    """The first units, with the numbers of their modules, for which fewer units equal zeroed ones; or why not.

    Numbers that a module computes with, such as its number of heads, are found by trial: those that count units by
    name, with and without those whose values are the sizes of the matrices.
    """
    with torch.no_grad():
        intact = taken.again().run()
        reason = ""
        for units in options:
            if units.kind == EXPERTS and (units.count % ALIGNED or units.count < 2 * ALIGNED):
                return f"numbers of channels are multiples of {ALIGNED}, and an expert has {units.count}"
            if units.kind == HEADS and units.count == len(units.columns):
                return "each of its channels has a state over tokens of its own, as in a recurrent layer"
            zeroed = [(kept, _zeroed(taken, units, kept).run()) for kept in _choices_of_units(units)]
            for numbers in _choices(taken.layer, units):
                tried = replace(units, numbers=numbers)
                told = next(filter(None, (_wrong(taken, tried, kept, z, intact) for kept, z in zeroed)), None)
                if told is None:
                    return _handed_on(taken, tried) or tried
                reason = reason or told
            if units.kind == HEADS and (found := _entries_of_heads(taken, units, zeroed, intact)):
                return found
    return reason


def _wrong(taken: LayerCopy, units: Units, kept: Tensor, zeroed: Tensor, intact: Tensor) -> str | None:
    """In which way a layer of these units is not the one with zeros in place of the others; None if it is."""
    made = taken.again()
    try:
        set_sizes(made.layer, units, len(kept), _fewer(made.layer, units, kept))
        got = made.run()
    except Exception as error:  # whatever a module raises with shapes that it does not expect
        return f"it fails with fewer {units.kind} ({quoted(error)})"
    if got.shape != zeroed.shape or not got.isfinite().all():
        return f"with fewer {units.kind} its outputs have another shape, or are not finite"
    effect = float((zeroed - intact).abs().max())
    if effect == 0:
        return f"zeroed {units.kind} do not change its outputs"
    difference = float((got - zeroed).abs().max()) / effect
    if difference > TOLERANCE:
        return f"with fewer {units.kind} its outputs differ by {difference:.1g} from those with zeroed {units.kind}"
    return None


def _handed_on(taken: LayerCopy, units: Units) -> str | None:
    """Why units cannot be removed although the hidden state is right: later layers are given their entries."""
    if not taken.handed:
        return None
    kept = _choices_of_units(units)[0]
    before, made = dict(tensors_of(taken.again().output())), taken.again()
    set_sizes(made.layer, units, len(kept), _fewer(made.layer, units, kept))
    after = dict(tensors_of(made.output()))
    if all(before[place].shape == after[place].shape for place in taken.handed if place in before):
        return None
    return f"later layers are given a tensor with entries of its {units.kind}"


def _entries_of_heads(taken: LayerCopy, units: Units, zeroed: Sequence[tuple[Tensor, Tensor]], intact: Tensor) -> str:
    """What beside the matrices has entries of heads, without which fewer heads equal zeroed ones; empty if nothing."""
    for numbers in _choices(taken.layer, units):
        tried = replace(units, numbers=numbers)
        for reason, fewer in _with_fewer_entries(taken, units):
            if not any(_wrong(fewer(kept), tried, kept, expected, intact) for kept, expected in zeroed):
                return reason
    return ""


def _with_fewer_entries(taken: LayerCopy, units: Units) -> Iterator[tuple[str, Callable[[Tensor], LayerCopy]]]:
    """A reason, and kept units -> the copy without the entries of the others on an axis of a tensor; for each axis."""
    total = units.count * units.heads
    arguments: dict[int | str, Any] = dict([*enumerate(taken.args), *taken.kwargs.items()])

    def rows(kept: Tensor, size: int) -> Tensor:
        heads = (kept[:, None] * units.heads + torch.arange(units.heads)).flatten()
        return (torch.arange(0, size, total)[:, None] + heads).flatten()  # samples and heads may be one axis

    def argument(kept: Tensor, key: int | str, dim: int) -> LayerCopy:
        given = {**arguments}
        given[key] = given[key].index_select(dim, rows(kept, given[key].shape[dim]).to(given[key].device))
        args = tuple(given[index] for index in range(len(taken.args)))
        return replace(taken, args=args, kwargs={name: given[name] for name in taken.kwargs})

    def table(kept: Tensor, name: str, dim: int) -> LayerCopy:
        made, (module, _, key) = taken.again(), name.rpartition(".")
        values = made.layer.get_parameter(name)
        fewer = values.detach().index_select(dim, rows(kept, total).to(values.device))
        set_parameter(made.layer.get_submodule(module), key, fewer, values)
        return made

    hidden = hidden_place(taken.args, taken.kwargs)
    for key, value in arguments.items():
        if isinstance(value, Tensor) and key != hidden:
            for dim, size in enumerate(value.shape):
                if size == total or (dim == 0 and size and size % total == 0):
                    yield (
                        "the model gives it a tensor with one entry for each head",
                        partial(argument, key=key, dim=dim),
                    )
    for name, values in taken.layer.named_parameters():
        if values.dim() > 1 and not is_linear(taken.layer.get_submodule(name.rpartition(".")[0])):
            for dim in (dim for dim, size in enumerate(values.shape) if size == total):
                yield "it has a table with one entry for each head", partial(table, name=name, dim=dim)


def _choices_of_units(units: Units) -> list[Tensor]:
    """Every second unit, and all but the first: in both, units have other numbers than before."""
    count = units.count
    if units.kind == EXPERTS:  # in a number that all kernels take
        every = torch.arange(1, count, 2)
        return [every[len(every) % ALIGNED :], torch.arange(ALIGNED, count)]
    return [torch.arange(1, count, 2), torch.arange(1, count)]


def _zeroed(taken: LayerCopy, units: Units, kept: Tensor) -> LayerCopy:
    made = taken.again()
    if isinstance(units, ExpertUnits):
        zero_experts(made.layer, units, _by_expert(units, kept))
        return made
    for name, tensor in tensors_of_units(made.layer, units).items():
        module_name, _, key = name.rpartition(".")
        if module_name in units.readers:
            module = made.layer.get_submodule(module_name)
            rows = turned(module, tensor) if key == "weight" else tensor
            rows[_gone(units.readers[module_name], kept)] = 0
        elif module_name == units.writer and key == "weight":
            turned(made.layer.get_submodule(module_name), tensor)[:, _gone(units.columns, kept)] = 0
    return made


def _gone(owners: Tensor, kept: Tensor) -> Tensor:
    left = torch.ones(len(owners), dtype=torch.bool)
    left[rows_of(kept, owners)] = False
    return left


def _fewer(layer: nn.Module, units: Units, kept: Tensor) -> dict[str, Tensor]:
    if isinstance(units, ExpertUnits):
        return kept_of_experts(layer, units, _by_expert(units, kept))
    writer: Any = layer.get_submodule(units.writer)
    W = turned(writer, writer.weight.detach())[:, rows_of(kept, units.columns).to(writer.weight.device)]
    return {**kept_rows(layer, units, kept), f"{units.writer}.weight": turned(writer, W)}


def _by_expert(units: ExpertUnits, kept: Tensor) -> Tensor:
    """(experts, kept): other channels of the experts with odd numbers, counted from the last one."""
    mirrored = (units.count - 1 - kept).flip(0)
    return torch.stack([mirrored if expert % 2 else kept for expert in range(units.experts)])


def _choices(layer: nn.Module, units: Units) -> Iterator[dict[str, dict[str, int]]]:
    """Module's name -> attribute -> contribution of a unit; the fewest numbers first."""
    width = len(units.columns)
    sizes = {len(rows) for rows in units.readers.values()} | {int((r >= 0).sum()) for r in units.readers.values()}
    values = {units.count, units.count * units.heads, width} | sizes
    named, sized = [], []
    for module_name, key, value in _numbers(layer, units):
        if value not in values or value % units.count:
            continue
        if _COUNTS[units.kind].search(key) and not _OTHERS.search(key):
            named.append((module_name, key, value // units.count))
        elif value == width or value in sizes:
            sized.append((module_name, key, value // units.count))
    told = [each for each in named if "." not in each[1]]
    for chosen in [told, *([*told, each] for each in sized), [*told, *sized], named, [*named, *sized]]:
        found: dict[str, dict[str, int]] = {}
        for module_name, key, each in chosen:
            found.setdefault(module_name, {})[key] = each
        yield found


def _numbers(layer: nn.Module, units: Units) -> Iterator[tuple[str, str, int]]:
    """(module, attribute, value) of the plain numbers around the matrices."""
    names = [name.split(".")[:-1] for name in units.matrices]
    scope = []
    for parts in zip(*names, strict=False):
        if len(set(parts)) > 1:
            break
        scope.append(parts[0])
    prefix = ".".join(scope)
    for name, module in layer.named_modules():
        inside = name == prefix or name.startswith(prefix + ".") if prefix else not name
        around = units.kind == EXPERTS and bool(name) and prefix.startswith(name + ".")  # as in DBRX
        if (inside or around) and not is_linear(module):
            for key, value in vars(module).items():
                if type(value) is int and key not in LAYER_INDEX_ATTRIBUTES:
                    yield name, key, value
                elif isinstance(value, PreTrainedConfig):
                    # Not by getattr, which raises where layers have numbers of their own (`per_layer_config`).
                    for each in ("num_attention_heads", "num_key_value_heads"):
                        if type(vars(value).get(each)) is int:
                            yield name, f"{key}.{each}", vars(value)[each]
