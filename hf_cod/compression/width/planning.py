"""`plan_width`: plans the numbers of heads and channels of each layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

from torch import nn

from hf_cod.compression.width.settings import WidthSettings
from hf_cod.compression.width.width_plan import WidthPlan, plan_of_allocation, reachable
from hf_cod.io.arguments import checked
from hf_cod.io.deprecation import renamed
from hf_cod.io.module_names import ModuleFields
from hf_cod.io.settings import resolve
from hf_cod.layers.module_choice import ModuleChoice, choose_modules
from hf_cod.layers.stack import DecoderLayers, find_decoder_layers
from hf_cod.layers.unit_discovery import find_all_units
from hf_cod.layers.units import LayerUnits
from hf_cod.scoring.allocation import LayerAllocation, same_share


@renamed(parameters="parameter_share")
@checked
def plan_width(
    model: nn.Module,
    parameter_share: LayerAllocation | float,
    channel_multiple: int | None = None,
    *,
    layers_path: str | None = None,
    settings: WidthSettings | None = None,
    **fields: Unpack[ModuleFields],
) -> WidthPlan:
    """Decides how many attention heads and MLP channels each layer keeps; the model is not changed.

    Heads are removed in full groups that share a key and value head; the number of channels compensates the rounding
    (`functional.widths.choose_widths`). Parts of a layer with another structure are left unchanged.

    Args:
        model: a transformers model.
        parameter_share: share of the weights of the layers' matrices to keep, in 0..1, the same for all layers; or an
            allocation of "parameter_share", with one share for each layer.
        channel_multiple: numbers of channels are rounded to multiples of this, as close to the budget as possible;
            default: 32, for experts of fewer than 512 channels 8.
        layers_path: module name of the layer stack, if it cannot be found automatically.
        settings: `WidthSettings`, instead of single fields.
        **fields: or fields of `WidthSettings` by name: `include` and `exclude`, the matrices that may be cut, as PEFT's
            target_modules and exclude_modules.

    Raises:
        ValueError: no heads or channels of a known structure, a share out of range (says the least possible), an
            allocation of another kind or for another model.
    """
    how = resolve(plan_width, WidthSettings, settings, fields, channel_multiple=channel_multiple)
    stack = find_decoder_layers(model, layers_path)
    units = without_excluded(find_all_units(stack), choose_modules(stack, how))
    return plan_of_units(stack, units, parameter_share, how.channel_multiple)


def within_reach(
    stack: DecoderLayers, units: Sequence[LayerUnits], parameter_share: LayerAllocation | float, settings: Any
) -> tuple[LayerAllocation, list[str]]:
    """The allocation, raised where a layer cannot keep as little (`width_plan.reachable`), and a note on that.

    Args:
        stack: the layers.
        units: of each layer, as `find_all_units` returns them.
        parameter_share: shares of layers, or one for all.
        settings: `channel_multiple`, `include` and `exclude`.

    Raises:
        ValueError: no heads or channels of a known structure, or a share of all layers that they cannot keep.
    """
    units = without_excluded(units, choose_modules(stack, settings))
    check_units(stack, units)
    return reachable(stack, units, _allocation(stack, parameter_share), settings.channel_multiple)


def without_excluded(units: Sequence[LayerUnits], choice: ModuleChoice) -> list[LayerUnits]:
    """The units all of whose matrices are chosen; for the others, the reason why they are not removed."""
    found = []
    for layer in units:
        left, whole = [], [*layer.whole]
        for own in layer.found:
            names = [name for name in own.matrices if name in choice.excluded]
            if names:
                ends = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
                kind = own.kind.replace("_", " ")
                whole.append(f"{kind} are not removed: they are rows or columns of {ends}, excluded by name")
            else:
                left.append(own)
        found.append(LayerUnits(left, whole))
    return found


def plan_of_units(
    stack: DecoderLayers, units: Sequence[LayerUnits], parameter_share: LayerAllocation | float, channel_multiple: int
) -> WidthPlan:
    """The plan for units that were already found; see `plan_width`."""
    check_units(stack, units)
    return plan_of_allocation(stack, list(units), _allocation(stack, parameter_share), channel_multiple)


def _allocation(stack: DecoderLayers, parameter_share: LayerAllocation | float) -> LayerAllocation:
    return parameter_share if isinstance(parameter_share, LayerAllocation) else same_share(stack, parameter_share)


def check_units(stack: DecoderLayers, units: Sequence[LayerUnits]) -> None:
    """Checks that there are heads or channels that can be removed.

    Raises:
        ValueError: there are none; says why.
    """
    if not any(layer.found for layer in units):
        raise ValueError(
            f"model: expected heads or channels of a known structure in {type(stack.model).__name__}, got none; "
            + "; ".join(units[0].whole)
        )
