"""`plan_width`: how many heads and channels each layer keeps, before anything is removed."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from hf_cod.compression.width.settings import CHANNEL_MULTIPLE
from hf_cod.compression.width.width_plan import WidthPlan, plan_of_allocation
from hf_cod.io.arguments import checked
from hf_cod.layers.stack import DecoderLayers, find_decoder_layers
from hf_cod.layers.units import LayerUnits, find_units
from hf_cod.scoring.allocation import LayerAllocation, same_share


@checked
def plan_width(
    model: nn.Module,
    parameters: LayerAllocation | float,
    channel_multiple: int = CHANNEL_MULTIPLE,
    *,
    layers_path: str | None = None,
) -> WidthPlan:
    """Decides how many attention heads and MLP channels each layer keeps; the model is left as it was.

    Heads go in whole groups that share a key and value head; channels make up for what that rounds
    (`functional.widths.choose_widths`). What a layer has of another structure stays whole.

    Args:
        model: a transformers model.
        parameters: share of the weights of the layers' matrices to keep, in 0..1; or an allocation of "parameters", by
            which each layer keeps its own.
        channel_multiple: numbers of channels are rounded to one of this, as near to the budget as that allows.
        layers_path: the stack's module name where it cannot be found.

    Raises:
        ValueError: no heads or channels of a known structure, a share out of reach (says the least possible), an
            allocation of something else or for another model.
    """
    stack = find_decoder_layers(model, layers_path)
    units = [find_units(stack, index) for index in range(len(stack))]
    return plan_of_units(stack, units, parameters, channel_multiple)


def plan_of_units(
    stack: DecoderLayers, units: Sequence[LayerUnits], parameters: LayerAllocation | float, channel_multiple: int
) -> WidthPlan:
    """The same, of units that were found before."""
    check_units(stack, units)
    allocation = parameters if isinstance(parameters, LayerAllocation) else same_share(stack, parameters)
    return plan_of_allocation(stack, list(units), allocation, channel_multiple)


def check_units(stack: DecoderLayers, units: Sequence[LayerUnits]) -> None:
    """Makes sure that there is something that can go.

    Raises:
        ValueError: there is not; says why.
    """
    if not any(layer.found for layer in units):
        raise ValueError(
            f"model: expected heads or channels of a known structure in {type(stack.model).__name__}, got none; "
            + "; ".join(units[0].whole)
        )
