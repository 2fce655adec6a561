"""BankIncrement: the updates that one adapter adds to the matrices of a bank of experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_cod.functional.low_rank import gradient_basis, project
from hf_cod.functional.randomness import generator_of
from hf_cod.layers.replicas import average
from hf_cod.training.owlore.increment import Increment


class BankIncrement(Increment):
    """D_e = B_e A_e + lift(N_e, P_e) for each expert e, added to a frozen bank (experts, m, n).

    Each expert has a basis of its own, as the banks that `OwLoreAdamW` trains: that of its first gradient which is not
    0. Until then its P_e is 0. Tensors are those of `Increment`, with the experts as their first dimension; `lost` is
    the sum over the experts. See `Increment` for the arguments.
    """

    def forward(self, W: Tensor, turned: bool = False) -> Tensor:  # type: ignore[override]
        """W + D (experts, m, n), in W's dtype.

        Args:
            W: the bank, as it is stored.
            turned: whether its matrices are stored as (in, out).
        """
        trains = torch.is_grad_enabled() and self.N.requires_grad
        if not self.has_basis and not self.searching:
            self._require_optimizer()
            trains = False
        if trains:
            return _FirstGradients.apply(W, self.N, self, turned)
        return self.added(W, turned) if self.learnt or self.has_basis else W

    @torch.no_grad()
    def added(self, W: Tensor, turned: bool) -> Tensor:
        """W + D as a new tensor; the sum is computed in the dtype of the increment."""
        with torch.autocast(W.device.type, enabled=False):
            delta = self.dense()
        return delta.add_(W.mT if turned else W).to(W.dtype).mT if turned else delta.add_(W).to(W.dtype)

    def project_first(self, grad: Tensor, x: Tensor | None = None) -> Tensor:
        """The gradient of N, from that of the bank (experts, m, n); computes the bases of experts that have none."""
        found = self._missing()
        if found is not None:
            grad = grad.contiguous()
            average(grad)
        scale = grad.abs().amax((-2, -1), keepdim=True).to(self.N.dtype)
        if not bool(scale.isfinite().all()):
            return self.N.new_full(self.shape, float("nan"))
        G = grad.to(self.N.dtype) / torch.where(scale > 0, scale, 1)  # squares of large gradients may overflow
        if found is not None:
            self._add_bases(G, found & (scale > 0).flatten())
        if not self.has_basis:
            return self.N.new_zeros(self.shape)
        return project(G, self.P).to(self.N.dtype).mul_(scale)

    def _missing(self) -> Tensor | None:
        """Which experts have no basis, while the optimizer trains this; None if all have one."""
        if self.counts is None:
            return None
        if not self.has_basis:
            return torch.ones(self.experts, dtype=torch.bool, device=self.N.device)
        missing = ~self.P.flatten(1).any(1)
        return missing if bool(missing.any()) else None

    def _add_bases(self, G: Tensor, fresh: Tensor) -> None:
        if not bool(fresh.any()):
            return
        assert self.counts is not None
        generator = generator_of(*self.counts)
        if bool(fresh.all()):  # also of fake tensors, which cannot be indexed by a mask
            self.P = gradient_basis(G, self.rank, generator).to(self.P.dtype)
            return
        if not self.has_basis:
            self.P = self.P.new_zeros(*self.experts, min(G.shape[-2:]), self.rank)
        self.P[fresh] = gradient_basis(G[fresh], self.rank, generator).to(self.P.dtype)


class _FirstGradients(torch.autograd.Function):
    """W + D; the gradient of N is projected in the backward pass, in the bases that are found there."""

    @staticmethod
    def forward(ctx: Any, W: Tensor, N: Tensor, increment: BankIncrement, turned: bool) -> Tensor:
        ctx.increment, ctx.turned = increment, turned
        return increment.added(W, turned)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None, None]:
        return None, ctx.increment.project_first(grad.mT if ctx.turned else grad), None, None
