"""Which heads or channels of a matrix are kept, and the weight of those that are."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hf_cod.compression.width.gradients import Importance
from hf_cod.compression.width.methods import COMPENSATIONS, METHODS
from hf_cod.functional import channels
from hf_cod.layers.units import Units


@dataclass(frozen=True)
class Kept:
    """The kept units of a matrix.

    Attributes:
        units: their indices, ascending.
        W: the new weight (out, in) of the writer.
        bias: (out,), added to the writer's bias, or None.
        error: lost share of the energy of the writer's outputs; None if its inputs are not known.
    """

    units: Tensor
    W: Tensor
    bias: Tensor | None
    error: float | None


@dataclass(frozen=True)
class Selection:
    """How units are selected, and the error compensation.

    Attributes:
        method, compensation: see `narrow`.
        taylor: importance from gradients, measured beforehand.
    """

    method: str
    compensation: str
    taylor: Importance

    def __call__(
        self,
        weights: dict[str, Tensor],
        own: Units,
        number: int,
        M: Tensor | None,
        unseen: bool = False,
        expert: int | None = None,
    ) -> Kept:
        """Selects the units of one matrix, or of one of an expert.

        Args:
            weights: name -> weight (out, in) of the matrices of the units.
            own: the units.
            number: how many are kept.
            M: moments of the writer's inputs, or None.
            unseen: whether they would be needed, and no token entered the matrix: units are chosen by magnitude,
                without error compensation.
            expert: whose units these are.
        """
        method = METHODS["magnitude" if unseen else self.method]
        compensate = COMPENSATIONS["none" if unseen else self.compensation]
        if method.measure is None:
            found = self.taylor[own.writer]
            importance = found if expert is None else found[expert]
        else:
            importance = method.measure(weights, own, M)
        W = weights[own.writer]
        kept = channels.largest(importance, number).cpu()
        k = channels.rows_of(kept, own.columns).to(W.device)
        narrower, bias = compensate(W, M, k)
        error = None if M is None else channels.lost_energy(W, M, k, narrower, bias)
        return Kept(kept, narrower, bias, error)
