"""How much a head or a channel matters, and how what is left makes up for those that go: two tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from hf_cod.functional import channels
from hf_cod.layers.units import Units


@dataclass(frozen=True)
class Method:
    """A way to measure importance.

    Attributes:
        inputs: whether it needs those of the layer as it is changed.
        gradients: whether it needs those of the intact model.
        measure: (weights by name, units, moments of the writer's inputs) -> (count,); None: found in the gradients.
    """

    inputs: bool
    gradients: bool
    measure: Callable[[dict[str, Tensor], Units, Tensor | None], Tensor] | None


def _fluctuation(weights: dict[str, Tensor], units: Units, M: Tensor | None) -> Tensor:
    assert M is not None
    return channels.fluctuation(weights[units.writer], M, units.count)


def _magnitude(weights: dict[str, Tensor], units: Units, M: Tensor | None) -> Tensor:
    readers = [(weights[name], parts) for name, parts in units.readers.items()]
    return channels.magnitude(readers, weights[units.writer], units.count)


METHODS = {
    "fluctuation": Method(inputs=True, gradients=False, measure=_fluctuation),
    "taylor": Method(inputs=False, gradients=True, measure=None),
    "magnitude": Method(inputs=False, gradients=False, measure=_magnitude),
}
# (weight (out, in), moments of its inputs or None, kept columns) -> the columns that are left, and what joins the bias.
COMPENSATIONS: dict[str, Callable[[Tensor, Tensor | None, Tensor], tuple[Tensor, Tensor | None]]] = {
    "least_squares": channels.least_squares,
    "bias": channels.mean_bias,
    "none": channels.drop,
}


def needs_inputs(method: str, compensation: str) -> bool:
    """Whether layers have to be run to be changed."""
    return METHODS[method].inputs or compensation != "none"
