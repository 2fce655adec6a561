"""Compares a copy of a layer with fewer units to the copy with zeroed ones, before a weight of the model changes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from hf_cod.functional.channels import rows_of
from hf_cod.io.display import one_line
from hf_cod.layers.expert_units import ALIGNED, ExpertUnits, kept_of_experts, set_sizes, zero_experts
from hf_cod.layers.layer_copies import LayerCopy
from hf_cod.layers.orientation import is_linear, turned
from hf_cod.layers.units import CHANNELS, EXPERTS, HEADS, Units, kept_rows, tensors_of_units
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
                    return tried
                reason = reason or told
    return reason


def _wrong(taken: LayerCopy, units: Units, kept: Tensor, zeroed: Tensor, intact: Tensor) -> str | None:
    """In which way a layer of these units is not the one with zeros in place of the others; None if it is."""
    made = taken.again()
    try:
        set_sizes(made.layer, units, len(kept), _fewer(made.layer, units, kept))
        got = made.run()
    except Exception as error:  # whatever a module raises with shapes that it does not expect
        return f"it fails with fewer {units.kind} ({type(error).__name__}: {one_line(str(error))[:200]})"
    if got.shape != zeroed.shape or not got.isfinite().all():
        return f"with fewer {units.kind} its outputs have another shape, or are not finite"
    effect = float((zeroed - intact).abs().max())
    if effect == 0:
        return f"zeroed {units.kind} do not change its outputs"
    difference = float((got - zeroed).abs().max()) / effect
    if difference > TOLERANCE:
        return f"with fewer {units.kind} its outputs differ by {difference:.1g} from those with zeroed {units.kind}"
    return None


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
                    for each in ("num_attention_heads", "num_key_value_heads"):
                        if type(vars(value).get(each)) is int:
                            yield name, f"{key}.{each}", getattr(value, each)
