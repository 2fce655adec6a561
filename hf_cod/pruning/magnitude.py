"""Magnitude pruning: the smallest weights of each matrix go, whatever enters them."""

from __future__ import annotations

from torch import Tensor

from hf_cod.functional.sparsity import magnitude_mask
from hf_cod.pruning.method import Method, Target


def _prune(W: Tensor, sums: Tensor | None, target: Target) -> Tensor:
    return W.masked_fill(magnitude_mask(W, target.sparsity, target.pattern), 0)


MAGNITUDE = Method(_prune)
