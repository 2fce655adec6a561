"""Two tables: measures of the importance of heads and channels, and methods of error compensation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from hf_cod.functional import channels
from hf_cod.layers.units import Units


@dataclass(frozen=True)
class Method:
    """A measure of importance.

    Attributes:
        inputs: whether it requires the layer's inputs, with all layers before it changed.
        gradients: whether it requires gradients of the intact model.
        measure: (weights by name, units, moments of the writer's inputs) -> (count,); None: taken from the gradients.
    """

    inputs: bool
    gradients: bool
    measure: Callable[[dict[str, Tensor], Units, Tensor | None], Tensor] | None


def _fluctuation(weights: dict[str, Tensor], units: Units, M: Tensor | None) -> Tensor:
    assert M is not None
    return channels.fluctuation(weights[units.writer], M, units.columns, units.count)


def _magnitude(weights: dict[str, Tensor], units: Units, M: Tensor | None) -> Tensor:
    readers = [(weights[name], owners) for name, owners in units.readers.items()]
    return channels.magnitude(readers, weights[units.writer], units.columns, units.count)


METHODS = {
    "fluctuation": Method(inputs=True, gradients=False, measure=_fluctuation),
    "taylor": Method(inputs=False, gradients=True, measure=None),
    "magnitude": Method(inputs=False, gradients=False, measure=_magnitude),
}
# (weight (out, in), moments of its inputs or None, kept columns) -> new weight of these columns, addition to the bias.
COMPENSATIONS: dict[str, Callable[[Tensor, Tensor | None, Tensor], tuple[Tensor, Tensor | None]]] = {
    "least_squares": channels.least_squares,
    "bias": channels.mean_bias,
    "none": channels.drop,
}


def needs_inputs(method: str, compensation: str) -> bool:
    """Whether narrowing requires running the layers on batches."""
    return METHODS[method].inputs or compensation != "none"
