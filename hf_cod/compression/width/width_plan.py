"""WidthPlan: the numbers of heads and channels that each layer keeps, and of channels of its experts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from hf_cod.compression.width.settings import FEW_CHANNELS, check_channel_multiple
from hf_cod.functional.budget import raised_to
from hf_cod.functional.widths import Layer, Widths, choose_widths
from hf_cod.io.files import JsonFile
from hf_cod.io.schema import limits
from hf_cod.io.settings import Default
from hf_cod.layers.checks import check_sizes, name_of, sizes_of
from hf_cod.layers.expert_units import ALIGNED
from hf_cod.layers.stack import DecoderLayers
from hf_cod.layers.units import CHANNELS, EXPERTS, HEADS, LayerUnits, Units
from hf_cod.scoring.allocation import LayerAllocation

# Shares that are computed from a sum have rounding errors.
ROUNDING = 1e-6


@dataclass(frozen=True)
class WidthPlan(JsonFile):
    """The numbers of heads and channels that each layer keeps.

    Attributes:
        budget: the share of the layers' weights to keep.
        heads: query heads of each layer, in full groups that share a key and value head; None: all of them.
        channels: MLP channels of each layer, in mixtures those of a shared expert; None: all of them.
        method: the score by which shares were distributed.
        model: the name of the model for which the plan was made.
        sizes: weights in the matrices of each layer, to detect a plan for another model; None: unknown.
        expert_channels: channels of each routed expert, by layer; None: all of them.
    """

    FIELD = "width_plan"

    budget: float = field(metadata=limits(least=0, most=1))
    heads: list[int | None] = field(metadata=limits(least=0))
    channels: list[int | None] = field(metadata=limits(least=0, one_for_each="heads"))
    method: str
    model: str = ""
    sizes: list[int] | None = field(default=None, metadata=limits(least=0, one_for_each="heads"))
    expert_channels: list[int | None] | None = field(default=None, metadata=limits(least=0, one_for_each="heads"))

    def numbers(self) -> list[tuple[str, list[int | None]]]:
        """(kind, number of each layer)."""
        experts = self.expert_channels
        return [
            (HEADS, self.heads),
            (CHANNELS, self.channels),
            (EXPERTS, [None] * len(self.heads) if experts is None else experts),
        ]


def plan_of_allocation(
    stack: DecoderLayers, units: list[LayerUnits], allocation: LayerAllocation, channel_multiple: int
) -> WidthPlan:
    """Widths with which each layer keeps its share of weights; heads and channels keep equal shares, up to rounding.

    Raises:
        ValueError: an allocation of another kind or for another model; a share out of range (says the least possible).
    """
    if allocation.kind != "parameter_share":
        raise ValueError(f"plan: expected an allocation of parameter_share, got one of {allocation.kind}")
    if len(allocation.values) != len(stack):
        raise ValueError(f"plan: expected {len(stack)} values, one a layer, got {len(allocation.values)}")
    check_sizes("plan", allocation.model, allocation.sizes, stack)
    check_channel_multiple(channel_multiple)
    layers = [_layer(found, channel_multiple) for found in units]
    shares = [
        _share_of_units(stack, index, layer, share, channel_multiple, units[index].whole)
        for index, (layer, share) in enumerate(zip(layers, allocation.values, strict=True))
    ]
    some = [i for i, layer in enumerate(layers) if layer.count(layer.full)]
    widths_of_some = choose_widths([layers[i] for i in some], [shares[i] for i in some], channel_multiple)
    chosen = dict(zip(some, widths_of_some, strict=True))
    heads: list[int | None] = []
    channels: list[int | None] = []
    experts: list[int | None] = []
    for index, found in enumerate(units):
        widths = chosen.get(index, Widths(0, 0))
        group = found[HEADS]
        heads.append(widths.heads * group.heads if group else None)
        channels.append(widths.channels if found[CHANNELS] else None)
        experts.append(widths.experts if found[EXPERTS] else None)
    some_experts = experts if any(number is not None for number in experts) else None
    model = name_of(stack)
    return WidthPlan(
        allocation.budget, heads, channels, allocation.method, model, sizes_of(stack), expert_channels=some_experts
    )


def reachable(
    stack: DecoderLayers, units: Sequence[LayerUnits], allocation: LayerAllocation, channel_multiple: int
) -> tuple[LayerAllocation, list[str]]:
    """The allocation with no layer below the least share that it can keep; the other layers keep less for it.

    Returns:
        The same allocation, or another one with the same share of all layers; and a note on the layers that keep more.

    Raises:
        ValueError: the share of all layers is below the least possible one.
    """
    layers = [_layer(found, channel_multiple) for found in units]
    least = [_least(stack, index, layer, channel_multiple) for index, layer in enumerate(layers)]
    below = [
        i for i, (share, limit) in enumerate(zip(allocation.values, least, strict=True)) if share < limit - ROUNDING
    ]
    if not below:
        return allocation, []
    weights = torch.tensor(allocation.parameters, dtype=torch.float64)
    floors = torch.tensor(least, dtype=torch.float64)
    possible = float(floors @ weights / weights.sum())
    if allocation.mean < possible - ROUNDING:
        raise ValueError(
            f"parameter_share: expected at least {_rounded_up(possible)} of all layers "
            f"({_told_least(layers[below[0]], channel_multiple)}), got {allocation.mean:.4g}"
        )
    values = raised_to(floors, torch.tensor(allocation.values), weights).tolist()
    told = f"layer{'s' * (len(below) > 1)} {', '.join(map(str, below))}: more is kept than by the score, at least "
    return replace(allocation, values=values), [told + _told_least(layers[below[0]], channel_multiple)]


def kept_units(units: list[LayerUnits], plan: WidthPlan) -> list[dict[str, int]]:
    """For each layer: kind -> number of kept units, for the kinds of which some are removed.

    Raises:
        ValueError: a plan for another model, or a number of heads that splits a group; names the layer.
    """
    kept: list[dict[str, int]] = []
    for kind, numbers in plan.numbers():
        if len(numbers) != len(units):
            raise ValueError(f"{kind}: expected {len(units)} numbers, one a layer, got {len(numbers)}")
    for index, found in enumerate(units):
        kept.append({})
        for kind, number in ((kind, numbers[index]) for kind, numbers in plan.numbers()):
            own = found[kind]
            if number is None or (own is not None and number == own.count * own.heads):
                continue
            if own is None:
                raise ValueError(f"{kind}: expected none for layer {index}, got {number}; {'; '.join(found.whole)}")
            _check_number(kind, index, number, own)
            kept[-1][kind] = number // own.heads
    if not any(kept):
        raise ValueError(
            "plan: expected fewer heads or channels than the model has, got all of them; keep less, or lower "
            "channel_multiple"
        )
    return kept


def _check_number(kind: str, index: int, number: int, own: Units) -> None:
    group, most = (ALIGNED, own.count) if kind == EXPERTS else (own.heads, own.count * own.heads)
    if type(number) is int and group <= number <= most and number % group == 0:
        return
    why = "which kernels take" if kind == EXPERTS else "which share a key and value head"
    what = f"a multiple of {group}, {why}, in {group}" if group > 1 else "1"
    raise ValueError(f"{kind}: expected {what}..{most} in layer {index}, got {number}")


def _layer(units: LayerUnits, channel_multiple: int) -> Layer:
    found = [units[kind] for kind in (HEADS, CHANNELS, EXPERTS)]
    full = Widths(*(own.count if own else 0 for own in found))
    a, b, d = (own.weights if own else 0 for own in found)
    few = isinstance(channel_multiple, Default) and full.experts < FEW_CHANNELS
    return Layer(full, a, b, d, ALIGNED if few else math.lcm(channel_multiple, ALIGNED))


def _least(stack: DecoderLayers, index: int, layer: Layer, multiple: int) -> float:
    """The least share of its weights that a layer can keep."""
    total = stack.count_weights(index)
    return (total - layer.count(layer.full) + layer.count(layer.least(multiple))) / total if total else 0.0


def _told_least(layer: Layer, multiple: int) -> str:
    channels = layer.step if layer.full.experts and not layer.full.channels else multiple
    return f"one group of heads and {channels} channels, where they can be removed"


def _rounded_up(share: float) -> str:
    return f"{math.ceil(1e4 * share) / 1e4:g}"


def _share_of_units(
    stack: DecoderLayers, index: int, layer: Layer, share: float, multiple: int, whole: list[str]
) -> float:
    """The share that heads and channels keep, so that the layer with all other weights keeps `share`."""
    if not 0 <= share <= 1 or math.isnan(share):
        raise ValueError(f"plan: expected shares in 0..1, got {share} in layer {index}")
    total, own = stack.count_weights(index), layer.count(layer.full)
    least = _least(stack, index, layer, multiple)
    if share < least - ROUNDING:
        raise ValueError(
            f"parameter_share: expected at least {_rounded_up(least)} in layer {index} "
            f"({_told_least(layer, multiple)}), got {share:.4g}" + "".join(f"; {why}" for why in whole)
        )
    return 1.0 if not own else 1 - (1 - share) * total / own
